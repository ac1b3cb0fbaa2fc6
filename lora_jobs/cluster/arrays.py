"""Sweeps on their way to a cluster: one sbatch for the array, or one process here that starts task after task."""

from __future__ import annotations

import os
import socket
import sys
import time
from typing import TYPE_CHECKING

from lora_jobs.cluster.commands import find_command, find_query_seconds, run_command, start_detached
from lora_jobs.cluster.parsers import parse_config
from lora_jobs.cluster.submission import call_sbatch, find_created_at, refuse_without_slurm
from lora_jobs.errors import ClusterError, SubmissionError
from lora_jobs.runs import Submission

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_jobs.runs import Sweep

SEQUENCE = "lora_jobs.cluster.sequence"
# Slurm's default of MaxArraySize, the first task number that is too large. Source: slurm.conf(5).
DEFAULT_TASKS = 1001


def find_array_limit() -> int:
    """How many tasks an array may have here: MaxArraySize of the cluster; Slurm's default where nobody says."""
    if find_command("scontrol") is None:
        return DEFAULT_TASKS
    try:
        answer = run_command(["scontrol", "show", "config"], timeout=find_query_seconds())
    except ClusterError:
        return DEFAULT_TASKS
    limit = parse_config(answer.stdout).get("MaxArraySize", "")
    return int(limit) if answer.returncode == 0 and limit.isdecimal() else DEFAULT_TASKS


def refuse_long_array(tasks: int, limit: int) -> None:
    """SubmissionError when an array of so many tasks is more than the cluster takes."""
    if tasks > limit:
        raise SubmissionError(
            f"the sweep has {tasks:,} tasks, an array may have {limit:,} here (MaxArraySize of slurm.conf)",
            hint="take values out of the sweep, or submit it in parts",
        )


def submit_array(sweep: Sweep) -> Submission:
    """Queue a sweep whose files are written, by one sbatch; the job id is the array's.

    Errors: SubmissionError with Slurm's words made plain; CommandError when sbatch is away.
    """
    refuse_without_slurm()
    job_id = call_sbatch(sweep.script_path)
    return Submission(job_id, "slurm", time.time(), socket.gethostname())


def submit_sequence(sweep: Sweep, *, only: Sequence[str] = ()) -> Submission:
    """Start a process that runs the sweep's tasks (or `only` these) on this machine, `throttle` or one at a time.

    It lives on when this program ends; the job id is its pid. Errors: CommandError.
    """
    argv = [sys.executable, "-P", "-m", SEQUENCE, str(sweep.directory), *only]
    log = sweep.directory / "sweep.out"
    pid = start_detached(argv, env=os.environ, log=log)
    return Submission(str(pid), "local", time.time(), socket.gethostname(), pid_created_at=find_created_at(pid))
