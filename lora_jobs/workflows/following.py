"""Watching a run or a sweep: its progress, its log, and stopping it."""

from __future__ import annotations

import codecs
import time
from typing import TYPE_CHECKING, Any

from lora_jobs.cluster.client import cancel_job
from lora_jobs.cluster.local import cancel_local, stop_launcher
from lora_jobs.errors import RunError
from lora_jobs.runs import Run, find_run, find_runs_root, find_sweep, is_ended, load_metrics, load_sweep_submissions
from lora_jobs.workflows.observing import RunStatus, StatusReport, observe_runs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lora_jobs.runs import Sweep

SLURM_POLL_SECONDS = 15.0
LOCAL_POLL_SECONDS = 1.0


def follow_run(run: Run, *, poll_seconds: float = 0.5) -> Iterator[RunStatus | dict[str, Any]]:
    """New metrics rows as they are written, and a RunStatus whenever the state changes; ends with the run.

    The files are read every `poll_seconds`; Slurm is asked every 15 s, the process list every second.
    """
    seen = len(load_metrics(run))
    status = observe_runs([run], ranked=False).runs[0]
    yield status
    asked = time.monotonic()
    while True:
        rows = load_metrics(run)
        yield from rows[seen:]
        seen = len(rows)
        if not status.active:
            return
        time.sleep(poll_seconds)
        if time.monotonic() - asked >= (SLURM_POLL_SECONDS if status.backend == "slurm" else LOCAL_POLL_SECONDS):
            before, status = status, observe_runs([run], ranked=False).runs[0]
            asked = time.monotonic()
            if (status.state, status.reason) != (before.state, before.reason):
                yield status


def follow_sweep(sweep: Sweep) -> Iterator[StatusReport]:
    """The status of every task, again and again until none is active; Slurm is asked every 15 s."""
    while True:
        report = observe_runs(sweep.runs, ranked=False)
        yield report
        if all(is_ended(status.state) for status in report.runs):
            return
        is_local = all(status.backend in ("local", None) for status in report.runs)
        time.sleep(LOCAL_POLL_SECONDS if is_local else SLURM_POLL_SECONDS)


def find_logs(job: str | None) -> tuple[Run, list[Path]]:
    """The run and the logs of its newest attempt, oldest file first: the batch shell's, then the ranks' out and err."""
    run = find_run(job, find_runs_root())
    return run, list_logs(run)


def list_logs(run: Run) -> list[Path]:
    """The logs of the run's newest attempt, oldest file first."""
    if not run.logs.is_dir():
        return []
    numbered = [(int(number), path) for path in run.logs.glob("attempt-*.out") if (number := path.stem[8:]).isdecimal()]
    shells = sorted(run.logs.glob("slurm-*.out"), key=lambda path: path.stat().st_mtime)[-1:]
    if numbered:
        newest = max(numbered)[1]
        return [path for path in [*shells, newest, newest.with_suffix(".err")] if path.exists()]
    # Nothing began: what the launcher and its processes said before they could open the attempt's log.
    early = [run.logs / "local.out", *sorted(run.submitit.glob("*_log.*"))]
    return [path for path in [*shells, *early] if path.exists() and path.stat().st_size]


def read_log(job: str | None, *, follow: bool = False, poll_seconds: float = 0.5) -> Iterator[str]:
    """Text of the newest attempt's logs; with `follow` what is added, until the run ends.

    Errors: RunNotFoundError; RunError when nothing was written yet and `follow` is not asked for.
    """
    if (sweep := find_sweep(job, find_runs_root())) is not None:
        yield from read_sweep_logs(sweep, follow=follow)
        return
    run, paths = find_logs(job)
    if not paths and not follow:
        raise RunError(f"{run.id} has written no log yet", hint=f"lora-jobs status {run.id}")
    offsets: dict[Path, int] = {}
    while True:
        active = follow and observe_runs([run], ranked=False).runs[0].active
        for path in list_logs(run):
            with path.open("rb") as file:
                file.seek(offsets.get(path, 0))
                data = file.read()
            # A character that is half written is left for the next look, the last one takes what there is.
            text, used = codecs.utf_8_decode(data, "replace", not active)
            offsets[path] = offsets.get(path, 0) + used
            if text:
                yield text
        if not active:
            return
        time.sleep(poll_seconds)


def read_sweep_logs(sweep: Sweep, *, follow: bool = False) -> Iterator[str]:
    """The log of every task that has one, under its name. Errors: RunError when none has, or to follow is asked."""
    if follow:
        raise RunError(
            f"{sweep.name} is a sweep of {len(sweep.tasks)} runs: only one can be followed",
            hint=f"lora-jobs logs {sweep.tasks[0].run} -f",
        )
    written = [run for run in sweep.runs if list_logs(run)]
    if not written:
        raise RunError(f"no task of {sweep.name} has written a log yet", hint=f"lora-jobs status {sweep.name}")
    for run in written:
        yield f"==> {run.id} <==\n"
        yield from read_log(str(run.directory))
        yield "\n"


def cancel_sweep(sweep: Sweep) -> list[RunStatus]:
    """Stop every task that is alive, by one scancel for the array; returns what was alive.

    Errors: RunError when none is, ClusterError.
    """
    report = observe_runs(sweep.runs, ranked=False)
    alive = [status for status in report.runs if status.active]
    if not alive:
        raise RunError(f"{sweep.name}: none of its {len(sweep.tasks)} runs is running", hint="lora-jobs status")
    for submission in load_sweep_submissions(sweep):
        if submission.backend == "local":
            stop_launcher(submission)
    arrays = {status.job_id.partition("_")[0] for status in alive if status.backend == "slurm" and status.job_id}
    for job_id in sorted(arrays):
        cancel_job(job_id)
    for run in sweep.runs:
        if any(status.run == run.id and status.backend == "local" for status in alive):
            cancel_local(run)
    return alive


def cancel_run(job: str | None) -> RunStatus:
    """Stop a run for good; what is committed stays. Errors: RunError when it is not alive, ClusterError."""
    run = find_run(job, find_runs_root())
    status = observe_runs([run], ranked=False).runs[0]
    if not status.active:
        raise RunError(f"{run.id} is not running: {status.state}", hint=f"lora-jobs status {run.id}")
    if status.backend is None:
        raise RunError(
            f"{run.id} waits for its turn in {run.name}", hint=f"lora-jobs cancel {run.name} stops the whole sweep"
        )
    if status.state == "ELSEWHERE" or status.job_id is None:
        raise RunError(f"{run.id} can't be cancelled from here: {status.reason}", hint="log in there")
    if status.backend == "slurm":
        cancel_job(status.job_id)
    else:
        cancel_local(run)
    return status
