"""Records what a real Slurm answers, as input for the parsers' tests:

    python tests/slurm_output/record.py        # as root, about 2 minutes; writes tests/slurm_output/<version>/

It starts the test cluster, brings jobs into many states, and stores each answer as it came (stdout, then stderr).
The expectations in tests/unit/cluster/test_parsers.py are about these very files: look at the diff after recording.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "cluster"), str(HERE.parents[1])]

from slurm_cluster import ACCOUNT, OTHER_ACCOUNT, SlurmCluster  # noqa: E402

from lora_jobs.cluster.inventory import ASSOCIATION_FORMAT, QOS_FORMAT, SINFO_FORMAT  # noqa: E402
from lora_jobs.cluster.limits import ASSOCIATION_LIMITS_FORMAT, QOS_LIMITS_FORMAT  # noqa: E402
from lora_jobs.cluster.parsers import QUEUE_FORMAT, SACCT_FORMAT, SPRIO_FORMAT  # noqa: E402
from lora_jobs.cluster.partition import NODES_FORMAT  # noqa: E402

WHOLE_NODES = ("--nodes=2", "--gpus-per-node=4", "--time=00:30:00")
ONE_GPU = ("--gpus-per-node=1", "--time=00:10:00")
REFUSED = {
    "account": [f"--account={OTHER_ACCOUNT}"],
    "partition": ["--partition=nope"],
    "qos": ["--qos=nope"],
    "time": ["--time=3-0"],
    "qos_time": ["--qos=boost_qos_dbg", "--time=02:00:00"],
    "nodes": ["--nodes=3"],
    "gpus": ["--gpus-per-node=9"],
    "gpu_type": ["--gpus-per-node=h100:1"],
    "mem": ["--mem=9000G"],
    "cores": ["--cpus-per-task=400"],
    "constraint": ["--constraint=h100"],
    "reservation": ["--reservation=nope"],
    "option": ["--no-such-option"],
}


class Recorder:
    def __init__(self, cluster: SlurmCluster, scratch: Path) -> None:
        self.cluster = cluster
        self.script = scratch / "job.sh"
        self.output = scratch / "%j.out"
        version = cluster.call("sbatch", "--version").stdout.split()[1]
        self.directory = HERE / ".".join(version.split(".")[:2])
        self.directory.mkdir(exist_ok=True)

    def submit(self, *options: str, body: str = "sleep 600") -> str:
        self.script.write_text(f"#!/bin/bash\n{body}\n")
        answer = self.cluster.call("sbatch", "--parsable", f"--output={self.output}", *options, str(self.script))
        return answer.stdout.strip()

    def record(self, name: str, *argv: str) -> None:
        answer = self.cluster.call(*argv, check=False, timeout=90)
        text = (answer.stdout + answer.stderr).replace(str(self.script.parent), "/scratch")
        (self.directory / f"{name}.txt").write_text(text)

    def wait_for(self, job_id: str, *states: str) -> None:
        while True:
            answer = self.cluster.call("squeue", "-h", "--states=all", "-o", "%T", "-j", job_id).stdout.split()
            if any(state in answer for state in states):
                return
            time.sleep(0.5)


def record_refusals(recorder: Recorder) -> None:
    recorder.script.write_text("#!/bin/bash\nsleep 1\n")
    script = str(recorder.script)
    recorder.record("test_only", "sbatch", "--test-only", "--nodes=2", *ONE_GPU, script)
    for name, options in REFUSED.items():
        recorder.record(f"refused_{name}", "sbatch", "--test-only", *ONE_GPU, *options, script)
    held = recorder.submit("--hold", "--qos=boost_qos_one", *ONE_GPU)
    recorder.record("refused_submit_limit", "sbatch", "--qos=boost_qos_one", *ONE_GPU, script)
    recorder.cluster.call("scancel", held)
    recorder.record("squeue_unknown", "squeue", "-h", "-o", QUEUE_FORMAT, "-j", "99999")
    recorder.record("sprio_unknown", "sprio", "-h", "-o", SPRIO_FORMAT, "-j", "99999")
    recorder.record("scancel_unknown", "scancel", "99999")
    recorder.record("requeue_unknown", "scontrol", "requeue", "99999")


def record_inventory(recorder: Recorder) -> None:
    """What the cluster has and allows; one node is drained for it."""
    call = recorder.cluster.call
    call("scontrol", "update", "NodeName=lrdn0002", "State=DRAIN", "Reason=recording")
    recorder.record("sinfo", "sinfo", "-h", "-e", "-o", SINFO_FORMAT)
    call("scontrol", "update", "NodeName=lrdn0002", "State=RESUME")
    recorder.record("sinfo_version", "sinfo", "--version")
    recorder.record("scontrol_partition", "scontrol", "show", "partition", "-o")
    recorder.record("scontrol_config", "scontrol", "show", "config")
    recorder.record("sacctmgr_qos", "sacctmgr", "-n", "-P", "show", "qos", f"format={QOS_FORMAT}")
    recorder.record(
        "sacctmgr_assoc", "sacctmgr", "-n", "-P", "show", "assoc", "user=root", f"format={ASSOCIATION_FORMAT}"
    )


def record_limits(recorder: Recorder) -> None:
    """Limits of a QOS, of a partition's QOS, of a user and of the accounts above; taken away again."""
    call = recorder.cluster.call
    add, change = ("sacctmgr", "-i", "add"), ("sacctmgr", "-i", "modify")
    call(*add, "account", "institute", "Cluster=leotest", "GrpTRES=gres/gpu=16", "GrpJobs=40")
    call(*add, "qos", "narrow", "MaxJobsPerUser=1", "GrpTRESMins=gres/gpu=6000", "MaxTRESPerUser=gres/gpu=4,cpu=64")
    call(*change, "account", ACCOUNT, "set", "Parent=institute", "MaxJobs=3", "GrpTRESMins=gres/gpu=90000")
    call(*change, "user", "root", f"account={ACCOUNT}", "set", "GrpJobs=2", "MaxWall=12:00:00")
    # slurmctld hears of a new QOS from slurmdbd; it takes a partition's from scontrol at once.
    call("scontrol", "update", "PartitionName=boost_urgent", "QoS=narrow")
    show = ("sacctmgr", "-n", "-P", "show")
    of_group = ("assoc", "user=", "user=root", "cluster=leotest")
    of_user = ("assoc", "user=root", f"account={ACCOUNT.lower()}", "cluster=leotest")
    recorder.record("sacctmgr_group_limits", *show, *of_group, f"format={ASSOCIATION_LIMITS_FORMAT}")
    recorder.record("sacctmgr_user_limits", *show, *of_user, f"format={ASSOCIATION_LIMITS_FORMAT}")
    recorder.record("sacctmgr_qos_limits", *show, "qos", "normal,narrow", f"format={QOS_LIMITS_FORMAT}")
    recorder.record("scontrol_partition_qos", "scontrol", "show", "partition", "boost_urgent", "-o")
    call("scontrol", "update", "PartitionName=boost_urgent", "QoS=")
    call(*change, "account", ACCOUNT, "set", "Parent=root", "MaxJobs=-1", "GrpTRESMins=gres/gpu=-1")
    call(*change, "user", "root", f"account={ACCOUNT}", "set", "GrpJobs=-1", "MaxWall=-1")


def record_queue(recorder: Recorder) -> None:
    """Every state that can be had within seconds, in an order in which each job gets the nodes it needs."""
    call = recorder.cluster.call
    recorder.wait_for(recorder.submit(*ONE_GPU, "--job-name=a|b", body="true"), "COMPLETED")
    recorder.wait_for(recorder.submit(*ONE_GPU, body="exit 3"), "FAILED")
    timed_out = recorder.submit("--gpus-per-node=1", "--time=00:01:00")
    down = recorder.submit(*ONE_GPU, "--no-requeue", "--nodelist=lrdn0002")
    recorder.wait_for(down, "RUNNING")
    call("scontrol", "update", "NodeName=lrdn0002", "State=DOWN", "Reason=recording")
    recorder.wait_for(down, "NODE_FAIL")
    recorder.cluster.call("scontrol", "update", "NodeName=lrdn0002", "State=RESUME", check=False)  # may be back already
    requeued = recorder.submit(*ONE_GPU, "--requeue", body="[[ -n ${SLURM_RESTART_COUNT:-} ]] || sleep 600")
    recorder.wait_for(requeued, "RUNNING")
    call("scontrol", "requeue", requeued)
    recorder.wait_for(requeued, "COMPLETED")
    recorder.wait_for(timed_out, "TIMEOUT")
    cancelled = recorder.submit(*ONE_GPU)
    recorder.wait_for(cancelled, "RUNNING")
    call("scancel", cancelled)
    recorder.wait_for(cancelled, "CANCELLED")
    record_waiting(recorder)
    recorder.record("sacct", "sacct", "-X", "-P", "-n", "-o", SACCT_FORMAT)
    recorder.record("sacct_duplicates", "sacct", "-X", "-D", "-P", "-n", "-o", SACCT_FORMAT, "-j", requeued)


def record_waiting(recorder: Recorder) -> None:
    """A full partition, what waits before it and why, and a node taken out of service."""
    running = recorder.submit(*WHOLE_NODES)
    recorder.wait_for(running, "RUNNING")
    recorder.submit(*WHOLE_NODES)
    recorder.submit(*ONE_GPU, "--array=0-3,7%2")
    recorder.submit(*ONE_GPU, f"--dependency=afterok:{running}")
    recorder.submit(*ONE_GPU, "--hold")
    recorder.submit(*ONE_GPU, "--begin=now+1hour")
    time.sleep(6)  # one round of the backfill scheduler: it fills in the expected starts
    recorder.record("squeue", "squeue", "-h", "--states=all", "--sort=i", "-o", QUEUE_FORMAT)
    queue = ("env", "SLURM_BITSTR_LEN=0", "squeue", "-h", "--states=all", "--sort=i", "-o", QUEUE_FORMAT)
    recorder.record("queue", *queue)
    recorder.record("sprio", "sprio", "-h", "-o", SPRIO_FORMAT)
    recorder.cluster.call("scontrol", "update", "NodeName=lrdn0002", "State=DRAIN", "Reason=broken | fan")
    recorder.record("sinfo_nodes", "sinfo", "-h", "-p", "boost_usr_prod", "-o", NODES_FORMAT)
    recorder.cluster.call("scontrol", "update", "NodeName=lrdn0002", "State=RESUME")


def record_failures(recorder: Recorder) -> None:
    cluster = recorder.cluster
    script = str(recorder.script)
    cluster.stop_process("munged")
    recorder.record("refused_munge", "sbatch", "--test-only", *ONE_GPU, script)
    cluster._start_munge()
    cluster.stop_process("slurmdbd")
    recorder.record("sacct_down", "sacct", "-X", "-P", "-n", "-o", SACCT_FORMAT, "-j", "1")
    cluster.stop_process("slurmctld")
    recorder.record("squeue_down", "squeue", "-h", "-o", QUEUE_FORMAT)
    recorder.record("sprio_down", "sprio", "-h", "-o", SPRIO_FORMAT)
    recorder.record("refused_controller", "sbatch", "--test-only", *ONE_GPU, script)


def main() -> None:
    scratch = Path(tempfile.mkdtemp(prefix="record-"))
    cluster = SlurmCluster(scratch / "slurm")
    try:
        cluster.start()
        recorder = Recorder(cluster, scratch)
        record_inventory(recorder)
        record_limits(recorder)
        record_refusals(recorder)
        record_queue(recorder)
        cluster.call("scancel", "--user=root")
        record_failures(recorder)
        print(f"recorded {len(list(recorder.directory.iterdir()))} answers in {recorder.directory}")
    finally:
        cluster.stop()
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
