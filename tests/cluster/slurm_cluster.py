"""A real Slurm on this machine: munge, MariaDB, slurmdbd, slurmctld and three slurmd, all in one directory.

The tests start one for their session. By hand, to try commands against it:

    eval "$(python tests/cluster/slurm_cluster.py up /tmp/slurm)"     # exports SLURM_CONF
    sinfo
    python tests/cluster/slurm_cluster.py down /tmp/slurm

Everything runs as root with ports, sockets and directories of its own; nothing under /etc/slurm, /etc/munge or
/var/lib/mysql is read or written. The one file touched outside is /etc/hosts, where the node names are added (and
taken away again): ranks meet at the first node's name. Needed Debian packages: see PACKAGES.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable

PACKAGES = "slurm-wlm slurmdbd munge mariadb-server"
PROGRAMS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sbatch", "sacctmgr")
SEARCH_PATH = f"{os.environ.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin"
GPU_NODES = ("lrdn0001", "lrdn0002")
CPU_NODES = ("big0001",)
NODES = GPU_NODES + CPU_NODES
HOSTS = Path("/etc/hosts")
ACCOUNT = "IscrC_TEST"
OTHER_ACCOUNT = "IscrC_OTHER"
READY_SECONDS = 60.0
STOP_SECONDS = 10.0

# Partitions: boost_usr_prod is preempted by boost_urgent, with a grace time to save in.
SLURM_CONF = """\
ClusterName=leotest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[slurmctld]}
SlurmUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits (BeginTime) before it may start again; the default is 120.
AuthInfo=socket={root}/munge/socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/%n.log
PlugStackConfig={root}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
GresTypes=gpu
PropagateResourceLimits=NONE
ReturnToService=2
SlurmdTimeout=30
SlurmctldTimeout=30
MessageTimeout=20
BatchStartTimeout=30
KillWait=5
MinJobAge=60
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0,sched_min_interval=100000,bf_resolution=60
PriorityType=priority/multifactor
PriorityCalcPeriod=1
PriorityDecayHalfLife=7-0
PriorityWeightAge=1000
PriorityMaxAge=7-0
PriorityWeightFairshare=10000
PriorityWeightJobSize=1000
PriorityWeightPartition=2000
PriorityWeightQOS=4000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
EnforcePartLimits=ALL
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={ports[slurmdbd]}
# Under munge this "password" is the socket for talking to slurmdbd; AuthInfo is not used there.
AccountingStoragePass={root}/munge/socket
AccountingStorageTRES=gres/gpu
AccountingStorageEnforce=associations,limits,qos
NodeName=lrdn[0001-0002] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[lrdn0001]}-{ports[lrdn0002]}] \
CPUs=32 RealMemory=494000 Gres=gpu:a100:4 Feature=a100
NodeName=big0001 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[big0001]} CPUs=32 RealMemory=64000
PartitionName=boost_usr_prod Nodes=lrdn[0001-0002] Default=YES MaxTime=1-00:00:00 DefaultTime=00:30:00 MaxNodes=2 \
PriorityTier=1 PriorityJobFactor=1 PreemptMode=REQUEUE GraceTime={grace_seconds} State=UP
PartitionName=boost_urgent Nodes=lrdn[0001-0002] MaxTime=1:00:00 PriorityTier=10 PriorityJobFactor=10 \
PreemptMode=OFF State=UP
PartitionName=lrd_all_serial Nodes=big0001 MaxTime=04:00:00 MaxNodes=1 PriorityTier=1 State=UP
"""

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket
DbdHost=localhost
DbdPort={ports[slurmdbd]}
SlurmUser=root
LogFile={root}/log/slurmdbd.log
PidFile={root}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={ports[mariadb]}
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm_acct_db
"""


def find_missing() -> str | None:
    """Why a cluster cannot be started here, in words, or None."""
    if os.geteuid() != 0:
        return "a real Slurm needs root (munge, slurmctld and slurmd are started by the test)"
    missing = [program for program in PROGRAMS if shutil.which(program, path=SEARCH_PATH) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (apt-get install --no-install-recommends {PACKAGES})"
    return None


def find_ports() -> dict[str, int]:
    """Free TCP ports below the ephemeral range; the slurmd of the GPU nodes get consecutive ones."""
    names = ("mariadb", "slurmdbd", "slurmctld", *NODES)
    for _ in range(200):
        first = 20_000 + secrets.randbelow(10_000)
        if all(is_free(first + offset) for offset in range(len(names))):
            return {name: first + offset for offset, name in enumerate(names)}
    raise RuntimeError("no free ports between 20000 and 30000")


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


@dataclass
class SlurmCluster:
    """One cluster in one directory; `start` it, use `environment`, `stop` it."""

    root: Path
    grace_seconds: int = 60
    ports: dict[str, int] = field(default_factory=dict)
    processes: dict[str, list[float]] = field(default_factory=dict)  # name -> [pid, create time]

    @property
    def slurm_conf(self) -> Path:
        return self.root / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment with SLURM_CONF of this cluster and without another job's variables."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return {**kept, "PATH": SEARCH_PATH, "SLURM_CONF": str(self.slurm_conf)}

    def start(self) -> None:
        """Start every daemon and wait until the three nodes are idle; about 10 seconds."""
        try:
            self._write_files()
            self._start_munge()
            self._start_database()
            self._start_accounting()
            self._start_slurm()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop what `start` started, last first; nothing else."""
        for name in reversed(list(self.processes)):
            self.stop_process(name)
        self.kill_steps()
        self._save()
        self._name_nodes(False)

    def call(self, *argv: str, check: bool = True, timeout: float = 30) -> subprocess.CompletedProcess[str]:
        """Run a Slurm command against this cluster."""
        return subprocess.run(argv, env=self.environment, check=check, timeout=timeout, capture_output=True, text=True)

    def start_process(self, name: str, *argv: str, **extra: str) -> None:
        """Start a daemon in the foreground, in a session of its own, its output in log/NAME.out."""
        with (self.root / "log" / f"{name}.out").open("ab") as log:
            pid = spawn(argv, {**self.environment, **extra}, log)
        self.processes[name] = [pid, psutil.Process(pid).create_time()]
        self._save()

    def stop_process(self, name: str, number: int = signal.SIGTERM) -> None:
        """Stop one daemon: `number`, then SIGKILL after a while. A pid that is another process by now is left alone."""
        pid, created = self.processes.pop(name)
        try:
            process = psutil.Process(int(pid))
            if abs(process.create_time() - created) > 1:
                return
            process.send_signal(number)
            if not wait_for_end(process, STOP_SECONDS):
                process.kill()
                wait_for_end(process, STOP_SECONDS)
        except psutil.NoSuchProcess:
            return

    def start_node(self, node: str) -> None:
        self.start_process(node, "slurmd", "-D", "-N", node, "-f", str(self.slurm_conf))

    def kill_steps(self) -> None:
        """Kill what this cluster's slurmd started and left: step daemons live on without it, tasks without them.

        A step daemon hides its arguments and environment; it is ours when it logs into our directory.
        """
        for process in psutil.process_iter(["name"]):
            with contextlib.suppress(psutil.Error):
                if process.info["name"] == "slurmstepd" and any(
                    file.path.startswith(f"{self.root}/log/") for file in process.open_files()
                ):
                    for child in [*process.children(recursive=True), process]:
                        child.kill()

    def _write_files(self) -> None:
        if not self.ports:
            self.ports = find_ports()
        for name in ("munge", "state", "spool", "run", "log", "gpu", "database"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        values = {
            "root": self.root,
            "host": socket.gethostname(),
            "ports": self.ports,
            "grace_seconds": self.grace_seconds,
            "password": secrets.token_hex(16),
        }
        self.slurm_conf.write_text(SLURM_CONF.format(**values))
        (self.root / "plugstack.conf").write_text("")
        # slurmdbd looks for its file beside $SLURM_CONF, so nothing is needed under /etc/slurm.
        database = self.root / "slurmdbd.conf"
        database.touch(mode=0o600)
        database.write_text(SLURMDBD_CONF.format(**values))
        for index in range(4):
            (self.root / "gpu" / f"nvidia{index}").touch()
        devices = f"NodeName=lrdn[0001-0002] Name=gpu Type=a100 File={self.root}/gpu/nvidia[0-3]\n"
        (self.root / "gres.conf").write_text(f"AutoDetect=off\n{devices}")
        self._name_nodes(True)

    def _name_nodes(self, wanted: bool) -> None:
        """Put this cluster's line into /etc/hosts, or take it away; other clusters have lines of their own."""
        mine = f"127.0.0.1 {' '.join(NODES)}  # lora-jobs test cluster {self.root}\n"
        with HOSTS.open("r+") as hosts:
            fcntl.flock(hosts, fcntl.LOCK_EX)
            text = hosts.read()
            changed = text.replace(mine, "") + (mine if wanted else "")
            if changed != text:
                hosts.seek(0)
                hosts.write(changed)
                hosts.truncate()

    def _start_munge(self) -> None:
        munge = self.root / "munge"
        key = munge / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        self.start_process(
            "munged", "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge}/socket",
            f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed", "--num-threads=2",
        )  # fmt: skip
        wait_until((munge / "socket").exists, "munged's socket", self.root)

    def _start_database(self) -> None:
        data = self.root / "database"
        if not (data / "mysql").exists():
            self.call(
                "mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}",
                "--auth-root-authentication-method=socket", "--skip-test-db", timeout=120,
            )  # fmt: skip
        password = next(
            line.partition("=")[2]
            for line in (self.root / "slurmdbd.conf").read_text().splitlines()
            if line.startswith("StoragePass=")
        )
        setup = self.root / "database.sql"
        setup.touch(mode=0o600)
        setup.write_text(
            "CREATE DATABASE IF NOT EXISTS slurm_acct_db;\n"
            f"CREATE OR REPLACE USER 'slurm'@'%' IDENTIFIED BY '{password}';\n"
            "GRANT ALL ON slurm_acct_db.* TO 'slurm'@'%';\n"
        )
        self.start_process(
            "mariadbd", "mariadbd", "--no-defaults", "--user=root", f"--datadir={data}",
            f"--socket={self.root}/run/mariadb.sock", f"--pid-file={self.root}/run/mariadb.pid",
            "--bind-address=127.0.0.1", f"--port={self.ports['mariadb']}", "--skip-name-resolve",
            "--innodb-buffer-pool-size=32M", "--innodb-lock-wait-timeout=900", "--innodb-flush-log-at-trx-commit=0",
            f"--init-file={setup}",
        )  # fmt: skip
        wait_until(lambda: is_listening(self.ports["mariadb"]), "mariadbd", self.root)

    def _start_accounting(self) -> None:
        self.start_process("slurmdbd", "slurmdbd", "-D")
        wait_until(
            lambda: self.call("sacctmgr", "-n", "list", "cluster", check=False).returncode == 0, "slurmdbd", self.root
        )
        if "leotest" in self.call("sacctmgr", "-nP", "list", "cluster", "format=cluster").stdout:
            return
        for words in (
            ("cluster", "leotest"),
            ("qos", "boost_qos_dbg", "set", "Priority=10", "MaxWall=00:30:00", "MaxTRESPerJob=node=2",
             "Flags=DenyOnLimit"),
            ("qos", "boost_qos_one", "set", "MaxSubmitJobsPerUser=1", "Flags=DenyOnLimit"),
            ("account", ACCOUNT, "Cluster=leotest", "Description=tests", "Organization=tests"),
            ("account", OTHER_ACCOUNT, "Cluster=leotest", "Description=tests", "Organization=tests"),
            ("user", "root", f"Account={ACCOUNT}", f"DefaultAccount={ACCOUNT}",
             "QOS=normal,boost_qos_dbg,boost_qos_one"),
        ):  # fmt: skip
            self.call("sacctmgr", "-i", "add", *words)

    def _start_slurm(self) -> None:
        self.start_process("slurmctld", "slurmctld", "-D", "-f", str(self.slurm_conf))
        for node in NODES:
            self.start_node(node)
        wait_until(self.is_idle, "the nodes", self.root)

    def is_idle(self) -> bool:
        """True when sinfo says idle for every node."""
        answer = self.call("sinfo", "-h", "-N", "-o", "%N %T", check=False).stdout.split("\n")
        return {line for line in answer if line} == {f"{node} idle" for node in NODES}

    def _save(self) -> None:
        state = {"ports": self.ports, "processes": self.processes}
        if self.root.is_dir():
            (self.root / "cluster.json").write_text(json.dumps(state))

    @classmethod
    def load(cls, root: Path) -> SlurmCluster:
        """The cluster that `up` started in this directory."""
        state = json.loads((root / "cluster.json").read_text())
        return cls(root=root, ports=state["ports"], processes=state["processes"])


def spawn(argv: tuple[str, ...], environment: dict[str, str], log: IO[bytes]) -> int:
    """Start a process that outlives this one, its output appended to `log`; returns its pid."""
    program = shutil.which(argv[0], path=SEARCH_PATH) or argv[0]
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, log.fileno(), 1),
        (os.POSIX_SPAWN_DUP2, log.fileno(), 2),
    ]
    return os.posix_spawn(program, argv, environment, file_actions=actions, setsid=True)


def wait_for_end(process: psutil.Process, seconds: float) -> bool:
    """True once the process has ended; one that its parent has not yet collected counts as ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process.pid, os.WNOHANG)
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(ready: Callable[[], bool], what: str, root: Path, seconds: float = READY_SECONDS) -> None:
    """Poll `ready`; on time-out raise with the ends of the logs."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if ready():
            return
        time.sleep(0.1)
    logs = [path for path in sorted((root / "log").iterdir()) if path.stat().st_size]
    ends = "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in logs)
    raise RuntimeError(f"{what} did not come up within {seconds:.0f} s\n{ends}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("action", choices=["up", "down"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--after", metavar="PID", type=int, help="down: wait for the end of this process first")
    arguments = parser.parse_args()
    root = arguments.directory.resolve()
    if (missing := find_missing()) is not None:
        print(f"cannot start a Slurm here: {missing}", file=sys.stderr)
        return 1
    if arguments.action == "up":
        SlurmCluster(root).start()
        print(f"export SLURM_CONF={root / 'slurm.conf'}")
        print(f"up: account {ACCOUNT}, resources.cluster=tests/cluster/test_cluster.yaml", file=sys.stderr)
        return 0
    if arguments.after is not None:
        while psutil.pid_exists(arguments.after):
            time.sleep(1)
    if not (root / "cluster.json").exists():
        print(f"no cluster was started in {root}", file=sys.stderr)
        return 1
    SlurmCluster.load(root).stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
