"""Watching one run: its progress, its log, and stopping it."""

from __future__ import annotations

import codecs
import time
from typing import TYPE_CHECKING, Any

from lora_jobs.cluster.client import cancel_job
from lora_jobs.cluster.local import cancel_local
from lora_jobs.errors import RunError
from lora_jobs.runs import Run, find_run, find_runs_root, load_metrics
from lora_jobs.workflows.observing import RunStatus, observe_runs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

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


def cancel_run(job: str | None) -> RunStatus:
    """Stop a run for good; what is committed stays. Errors: RunError when it is not alive, ClusterError."""
    run = find_run(job, find_runs_root())
    status = observe_runs([run], ranked=False).runs[0]
    if not status.active:
        raise RunError(f"{run.id} is not running: {status.state}", hint=f"lora-jobs status {run.id}")
    if status.state == "ELSEWHERE" or status.job_id is None:
        raise RunError(f"{run.id} can't be cancelled from here: {status.reason}", hint="log in there")
    if status.backend == "slurm":
        cancel_job(status.job_id)
    else:
        cancel_local(run)
    return status
