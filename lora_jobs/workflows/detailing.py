"""One run on one page: what Slurm says now, every start it had, its checkpoints, its script, the end of its log."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import asdict, replace

from lora_jobs.checkpoints import list_checkpoints, verify_checkpoint
from lora_jobs.runs import find_run, find_runs_root, load_attempts
from lora_jobs.workflows.evidence import find_sighting, is_ours, list_jobs
from lora_jobs.workflows.following import list_logs
from lora_jobs.workflows.looking import look_at_runs
from lora_jobs.workflows.measuring import Measured, compare_memory
from lora_jobs.workflows.observing import report_runs
from lora_jobs.workflows.priorities import FactorRow, list_factors
from lora_jobs.workflows.progress import load_prediction
from lora_jobs.workflows.results import Result, load_results

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lora_jobs.checkpoints import CheckpointVerdict
    from lora_jobs.cluster.parsers import SlurmJob
    from lora_jobs.runs import Attempt, Run
    from lora_jobs.workflows.observing import RunStatus

LOG_LINES = 8
_TAIL_BYTES = 16 * 1024


class Start(Struct, frozen=True):
    """One start of the run: as its own records and Slurm's accounting have it; times local ISO or None."""

    number: int | None
    job_id: str
    state: str
    started: str | None
    ended: str | None
    elapsed_seconds: float | None
    first_step: int | None
    last_committed_step: int | None
    reason: str | None
    node_list: str | None
    gpus: int | None = None


class RunPage(Struct, frozen=True):
    """Everything that `status JOB` shows."""

    status: RunStatus
    factors: tuple[FactorRow, ...]
    starts: tuple[Start, ...]
    checkpoints: tuple[CheckpointVerdict, ...]
    script: str | None
    log: str | None
    log_lines: tuple[str, ...]
    gpus: int | None
    gpu_hours: float | None
    notes: tuple[str, ...]
    memory: tuple[Measured, ...] = ()
    results: tuple[Result, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "runs": [self.status.to_json()],
            "notes": list(self.notes),
            "factors": [asdict(row) for row in self.factors],
            "starts": [asdict(start) for start in self.starts],
            "checkpoints": [verdict.to_json() for verdict in self.checkpoints],
            "script": self.script,
            "log": self.log,
            "log_lines": list(self.log_lines),
            "gpus": self.gpus,
            "gpu_hours": self.gpu_hours,
            "memory": [measured.to_json() for measured in self.memory],
            "results": [asdict(result) for result in self.results],
        }


def describe_run(job: str | None) -> RunPage:
    """The page of one run. Errors: RunNotFoundError; a Slurm that is away becomes a note."""
    run = find_run(job, find_runs_root())
    attempts = load_attempts(run)
    jobs = [each for each in list_jobs(run, attempts) if each.backend == "slurm"]
    ids = [each.job_id for each in jobs]
    look = look_at_runs([run], past=ids)
    (status,) = report_runs(look).runs
    past = [row for job_id in dict.fromkeys(ids) for row in look.seen.history.get(job_id, ())]
    history = [row for row in past if is_ours(run, row)]
    gpus = load_prediction(run).world_size
    starts = _count_gpus(_join_starts(attempts, history), attempts, gpus)
    log, lines = _read_tail(run)
    sighting = find_sighting(run, jobs[-1] if jobs else None, look.seen)
    seconds = sum((start.elapsed_seconds or 0) * (start.gpus or 0) for start in starts)
    return RunPage(
        status=status,
        factors=list_factors(sighting.job.factors if sighting else None, look.seen.config),
        starts=starts,
        checkpoints=tuple(verify_checkpoint(path, level=1) for path in list_checkpoints(run.checkpoints)),
        script=str(run.script_path) if run.script_path.exists() else None,
        log=str(log) if log else None,
        log_lines=lines,
        gpus=gpus,
        gpu_hours=round(seconds / 3600, 2) if gpus else None,
        notes=look.notes,
        memory=compare_memory(run),
        results=load_results(run),
    )


def _join_starts(attempts: Sequence[Attempt], rows: Sequence[SlurmJob]) -> tuple[Start, ...]:
    """Slurm's row per start (in order) beside our record of the same start; what only one of them knows stands alone.

    Slurm numbers the starts of a job from 0, as our restart count does; a start that never reached training has no
    record, a cluster without accounting has no rows.
    """
    started: dict[tuple[str, int], SlurmJob] = {}
    for row in sorted((row for row in rows if row.started), key=lambda row: row.started or ""):
        number = sum(1 for job_id, _ in started if job_id == row.job_id)
        started[row.job_id, number] = row
    recorded = {(attempt.job_id, attempt.restart_count): attempt for attempt in attempts}
    keys = dict.fromkeys([*recorded, *started])
    starts = [_describe_start(key[0], recorded.get(key), started.get(key)) for key in keys]
    return tuple(sorted(starts, key=lambda start: start.started or ""))


def _count_gpus(starts: Sequence[Start], attempts: Sequence[Attempt], newest: int | None) -> tuple[Start, ...]:
    """The starts with their own numbers of GPUs: a resume may change it, `newest` is that of the last submission.

    One that never reached training has no record; the other starts of its job had as many.
    """
    recorded = {attempt.number: attempt.world_size for attempt in attempts}
    of_jobs = {attempt.job_id: attempt.world_size for attempt in attempts}
    return tuple(
        replace(start, gpus=recorded.get(start.number or 0) or of_jobs.get(start.job_id) or newest) for start in starts
    )


def _describe_start(job_id: str, attempt: Attempt | None, row: SlurmJob | None) -> Start:
    state = row.state if row else attempt.state if attempt else "UNKNOWN"
    if row is not None and attempt is not None and attempt.has_ended and state in {"REQUEUED", "RUNNING"}:
        state = attempt.state
    elapsed = row.elapsed_seconds if row else None
    if elapsed is None and attempt is not None and attempt.ended_at is not None:
        elapsed = round(attempt.ended_at - attempt.started_at)
    return Start(
        number=attempt.number if attempt else None,
        job_id=job_id,
        state=state,
        started=(row.started if row else None) or (_format_time(attempt.started_at) if attempt else None),
        ended=(row.ended if row else None) or (_format_time(attempt.ended_at) if attempt else None),
        elapsed_seconds=elapsed,
        first_step=attempt.first_step if attempt else None,
        last_committed_step=attempt.last_committed_step if attempt else None,
        reason=attempt.reason if attempt else None,
        node_list=(row.node_list if row else None) or (attempt.host if attempt else None),
    )


def _format_time(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds).isoformat(timespec="seconds")


def _read_tail(run: Run) -> tuple[Path | None, tuple[str, ...]]:
    """The newest log that holds something, and its last lines."""
    for path in sorted(list_logs(run), key=lambda path: path.stat().st_mtime, reverse=True):
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
        if lines:
            return path, tuple(lines[-LOG_LINES:])
    return None, ()
