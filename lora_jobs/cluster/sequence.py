"""`python -m lora_jobs.cluster.sequence SWEEP [RUN...]`: runs a sweep's tasks on this machine, in order.

SIGTERM (`lora-jobs cancel SWEEP`) means that no further task is started; those that run are told by `cancel` itself.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from lora_jobs.cluster.local import is_running
from lora_jobs.cluster.submission import submit_local
from lora_jobs.errors import LoraJobsError
from lora_jobs.rendering import build_plan
from lora_jobs.runs import Run, append_submission, hold_run, load_attempts, load_submissions, load_sweep
from lora_jobs.spec import load_environment, load_spec

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

    from lora_jobs.rendering import Plan
    from lora_jobs.spec import ClusterEnvironment


def find_local_environment(name: str) -> ClusterEnvironment:
    """The environment of a run on this machine: the one that its spec names, unless that is a Slurm cluster."""
    environment = load_environment(name)
    return load_environment("local") if environment.scheduler == "slurm" else environment


def plan_task(run: Run) -> Plan:
    """The plan of a run whose files are written, as far as starting it needs."""
    spec = load_spec(run.spec_path)
    environment = find_local_environment(spec.resources.cluster)
    python = environment.python or sys.executable
    directory = run.directory
    return build_plan(
        spec, environment, backend="local", run_id=run.id, run_directory=directory, python=python, estimate={},
        versions={},
    )  # fmt: skip


def start_task(run: Run) -> int | None:
    """Start one task and record it; its pid, or None where it could not be started, which the sweep's log says."""
    try:
        with hold_run(run):
            if is_running(run):  # somebody resumed it by hand meanwhile
                return None
            before = max((attempt.number for attempt in load_attempts(run)), default=0)
            submission = replace(submit_local(plan_task(run), run), after_attempt=before)
            append_submission(run, submission)
    except LoraJobsError as error:
        print(f"{run.id} was not started: {error.message}", flush=True)
        return None
    print(f"{run.id} started as process {submission.job_id}", flush=True)
    return int(submission.job_id)


def run_tasks(runs: Sequence[Run], *, at_once: int) -> None:
    """Start the runs in their order, at most `at_once` at a time; returns when the last has ended."""
    waiting, stopped = deque(runs), False
    running: dict[int, Run] = {}

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    while running or (waiting and not stopped):
        while waiting and not stopped and len(running) < at_once:
            run = waiting.popleft()
            if (pid := start_task(run)) is not None:
                running[pid] = run
        if running:
            pid, _ = os.waitpid(-1, 0)
            ended = running.pop(pid, None)
            if ended is not None:
                print(f"{ended.id} ended", flush=True)


def main(arguments: Sequence[str]) -> None:
    """Run the tasks of the sweep in this directory that are named, or that were never submitted."""
    sweep, named = load_sweep(Path(arguments[0])), arguments[1:]
    runs = [run for run in sweep.runs if (run.id in named if named else not load_submissions(run))]
    run_tasks(runs, at_once=sweep.throttle or 1)


if __name__ == "__main__":
    main(sys.argv[1:])
