"""Starts of a run from outside its ranks, to be killed: the local launcher, and the real batch script in bash."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import yaml
from fault_ranks import LONGEST_SECONDS
from interruptions import note_start
from test_local_runs import wait_for_end
from tiny_runs import build_spec, create_tiny_run, read_logs

from lora_jobs.cluster.local import find_local_processes
from lora_jobs.cluster.submission import render_task
from lora_jobs.rendering import render_script
from lora_jobs.runs import Run, load_submissions
from lora_jobs.spec import load_spec, parse_environment, render_spec

if TYPE_CHECKING:
    import random
    from pathlib import Path

JOB = "4711"
ENVIRONMENT = {"scheduler": "slurm", "default_partition": "main", "partitions": {"main": {"gpu": "A100-64"}}}
FAKE_SRUN = """#!/bin/bash
# A fake, for tests: stands for Slurm's srun; starts the only task of a step on this machine.
while [[ $1 == --* ]]; do
    case $1 in --output=*) out=${1#*=} ;; --error=*) err=${1#*=} ;; esac
    shift
done
export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1
exec "$@" >> "$out" 2>> "$err"
"""
FAKE_SCONTROL = """#!/bin/bash
# A fake, for tests: stands for Slurm's scontrol; knows one job, on this machine.
case "$1 $2" in
"show hostnames") echo 127.0.0.1 ;;
"show job") echo "JobId=4711 JobState=RUNNING Requeue=1 EndTime=Unknown Deadline=N/A" ;;
esac
"""


@dataclass(frozen=True)
class Launched:
    """Runs that `lora-jobs submit --cluster local` starts."""

    root: Path
    tiny: Path
    sections: dict[str, Any]

    def call(self, *arguments: str) -> None:
        environment = {**os.environ, "LORA_JOBS_HOME": str(self.root / "runs"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "lora_jobs", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr

    def create(self) -> Run:
        """A run that is started at once."""
        spec = self.root / "spec.yaml"
        spec.write_text(render_spec(build_spec(self.tiny, **self.sections)))
        known = set((self.root / "runs").glob("tiny-*"))
        self.call("submit", str(spec), "--cluster", "local")
        (directory,) = set((self.root / "runs").glob("tiny-*")) - known
        return Run(directory)

    def start(self, run: Run) -> None:
        self.call("resume", run.id)

    def kill(self, run: Run, seconds: float, _chance: random.Random) -> bool:
        """kill -9 of the launcher after so long; its ranks train on without it. False where it had ended."""
        launcher = int(load_submissions(run)[-1].job_id)
        time.sleep(seconds)
        alive = launcher in find_local_processes(run)
        if alive:
            os.kill(launcher, signal.SIGKILL)
        wait_for_end(run)
        return alive

    def wait(self, run: Run) -> None:
        wait_for_end(run)


class Batch:
    """Runs whose own batch script bash runs, as slurmd would; srun and scontrol are fakes on PATH."""

    def __init__(self, root: Path, tiny: Path, sections: dict[str, Any]) -> None:
        self.root, self.tiny, self.sections = root, tiny, sections
        self.starts = 0
        self.runs = 0
        self.shell: subprocess.Popen[bytes] | None = None
        (root / "bin").mkdir(parents=True)
        for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL)):
            (root / "bin" / name).write_text(text)
            (root / "bin" / name).chmod(0o755)

    def create(self) -> Run:
        self.runs += 1
        run = create_tiny_run(self.root, f"batch-{self.runs}", self.tiny, **self.sections)
        environment = parse_environment(yaml.safe_dump(ENVIRONMENT), name="somewhere", file="envs/somewhere.yaml")
        script = render_script(
            load_spec(run.spec_path), environment, run_id=run.id, run_directory=run.directory, python=sys.executable
        )
        (run.directory / "script.sbatch").write_text(script)
        run.submitit.mkdir()
        (run.submitit / f"{JOB}_submitted.pkl").write_bytes(render_task(run.directory, "01:00:00"))
        self.start(run)
        return run

    def start(self, run: Run) -> None:
        """bash on the script, in a session of its own: the first start of the job, or the next after a requeue."""
        note_start(run)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SUBMITIT_"))}
        environment = {
            **inherited,
            "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}",
            "TMPDIR": str(self.root),
            "SLURM_JOB_ID": JOB,
            "SLURM_RESTART_COUNT": f"{self.starts}",
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_NODEID": "0",
        }
        self.starts += 1
        with (run.logs / "batch.log").open("ab") as log:
            self.shell = subprocess.Popen(
                ["/bin/bash", str(run.directory / "script.sbatch")],
                env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def kill(self, _run: Run, seconds: float, chance: random.Random) -> bool:
        """kill -9 of the shell after so long; then Slurm ends the rest of the job, asking first or at once."""
        shell = self.shell
        assert shell is not None
        time.sleep(seconds)
        alive = shell.poll() is None
        if alive:
            shell.kill()
        shell.wait()
        end_session(shell.pid, [signal.SIGTERM, signal.SIGKILL] if chance.random() < 0.5 else [signal.SIGKILL])
        return alive

    def wait(self, run: Run) -> None:
        assert self.shell is not None
        assert self.shell.wait(timeout=LONGEST_SECONDS) == 0, read_logs(run)


def end_session(session: int, numbers: list[signal.Signals], *, wait_seconds: float = 5.0) -> None:
    """Send each signal to all that is left of a session, and give it some seconds; return once nothing is left."""
    for number in numbers:
        deadline = time.monotonic() + (LONGEST_SECONDS if number == signal.SIGKILL else wait_seconds)
        for process in (left := list_session(session)):
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue
        while left and time.monotonic() < deadline:
            left = list_session(session)
            time.sleep(0.05)
    assert not left, left


def list_session(session: int) -> list[psutil.Process]:
    """The living processes of a session; its leader may be gone."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found
