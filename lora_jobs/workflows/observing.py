"""What each run is doing now: run directories first, then at most one question per Slurm command for all runs."""

from __future__ import annotations

import time
from datetime import datetime
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import asdict, replace

from lora_jobs.cluster.local import find_live_folders
from lora_jobs.cluster.reasons import explain_reason
from lora_jobs.errors import RunError
from lora_jobs.runs import (
    SWEEP_FILE,
    Run,
    explain_state,
    find_run,
    find_runs_root,
    find_sweep,
    is_ended,
    list_run_paths,
)
from lora_jobs.workflows.evidence import find_sighting, gather_evidence
from lora_jobs.workflows.folding import fold_sweeps
from lora_jobs.workflows.looking import look_at_runs
from lora_jobs.workflows.states import find_end_reason, find_own_attempt, resolve_state

if TYPE_CHECKING:
    from lora_jobs.cluster.observation import Observation, Sighting
    from lora_jobs.runs import Attempt
    from lora_jobs.spec import JobSpec
    from lora_jobs.workflows.looking import Look, Records
    from lora_jobs.workflows.progress import Progress

NEWEST = 20


class RunStatus(Struct, frozen=True):
    """One run as a waiting user wants to see it; times in seconds, None where not known.

    `reason` is Slurm's own word, `reason_text` the same in plain words. `rank` counts from 1 among `pending_jobs` of
    the partition. `expected_start` is Slurm's, `expected_finish` follows from the pace so far; both local ISO times.
    """

    run: str
    directory: str | None
    job_id: str | None
    backend: str | None
    state: str
    active: bool
    reason: str | None
    explanation: str
    next_step: str | None
    priority: int | None
    partition: str | None
    expected_start: str | None
    elapsed_seconds: float | None
    limit_seconds: int | None
    step: int | None
    total_steps: int | None
    loss: float | None
    eval_loss: float | None
    last_committed_step: int | None
    attempts: int
    adapter: str | None
    reason_text: str | None = None
    user: str | None = None
    rank: int | None = None
    pending_jobs: int | None = None
    factors: dict[str, int] | None = None
    tasks: dict[str, int] | None = None
    submitted: str | None = None
    started: str | None = None
    ended: str | None = None
    remaining_seconds: float | None = None
    expected_finish: str | None = None
    tokens_per_second: float | None = None
    memory_peak_bytes: int | None = None
    predicted_bytes: int | None = None
    sweep: str | None = None
    """The sweep that this run is a task of; in a row that stands for all of its tasks the same as `run`."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class StatusReport(Struct, frozen=True):
    """Every run that was asked for, newest first, and what could not be read."""

    runs: tuple[RunStatus, ...]
    notes: tuple[str, ...] = ()
    hidden: int = 0
    """How many older runs were left out."""
    partition: str | None = None
    """The one that was asked for; `elsewhere` says how many runs were looked at that are not known to be in it."""
    elsewhere: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "runs": [status.to_json() for status in self.runs],
            "notes": list(self.notes),
            "runs_not_shown": self.hidden,
            "runs_elsewhere": self.elsewhere,
        }


def load_stored_spec(run: Run) -> JobSpec:
    """The resolved spec that the run was submitted with. Raises RunError where it is gone."""
    from lora_jobs.spec import load_spec

    if not run.spec_path.exists():
        raise RunError(
            f"{run.id} has lost its {run.spec_path.name}: {run.spec_path}",
            hint="submit its spec again, as a new run; the checkpoints stay where they are",
        )
    return load_spec(run.spec_path)


def find_status(
    job: str | None = None,
    *,
    everything: bool = False,
    most: int = NEWEST,
    user: str | None = None,
    partition: str | None = None,
    factors: bool = True,
) -> StatusReport:
    """Status of one run, or of the newest `most`; one squeue, one sprio and one sacct at the most.

    Without `factors` of the priorities sprio is not asked.

    With `user` the queue's other jobs of that user stand below. Without `job`, `partition` keeps only what is known to
    be in it: no local run, and none that Slurm has forgotten.
    """
    root = find_runs_root()
    if job:
        sweep = find_sweep(job, root)
        return observe_runs(sweep.runs if sweep else [find_run(job, root)], user=user, factors=factors)
    known: dict[str, list[str]] = {}
    for path in list_run_paths(root):  # a sweep's runs have its name before theirs
        known.setdefault(path.partition("/")[0], []).append(path)
    shown = list(known.values())[: None if everything else most]
    runs = [Run(root / path) for paths in shown for path in paths]
    report = fold_sweeps(runs, observe_runs(runs, user=user, factors=factors))
    rows = [row for row in report.runs if partition is None or partition in (row.partition or "").split(",")]
    elsewhere = len(shown) - sum(1 for row in rows if row.directory is not None)
    return StatusReport(tuple(rows), report.notes, len(known) - len(shown), partition, elsewhere)


def observe_runs(
    runs: list[Run], *, user: str | None = None, ranked: bool = True, factors: bool = True
) -> StatusReport:
    """Join what the run directories hold with what Slurm knows of their newest jobs.

    Without `ranked` Slurm is asked for these jobs alone, and neither rank nor factors are given.
    """
    return report_runs(look_at_runs(runs, user=user, ranked=ranked, factors=factors and ranked))


def report_runs(look: Look) -> StatusReport:
    """A row per run, then one per job of a user whose jobs were asked for too."""
    alive = find_live_folders() if look.has_local else frozenset()
    statuses = [
        observe_run(run, look.records[run.id], look.seen, alive) if run.id in look.records else describe_unreadable(run)
        for run in look.runs
    ]
    mine = {status.job_id for status in statuses}
    others = [describe_job(sighting) for sighting in look.seen.of_users if sighting.job.job_id not in mine]
    return StatusReport((*statuses, *others), look.notes)


def describe_unreadable(run: Run) -> RunStatus:
    """The row of a run whose directory is damaged; whether it is alive is not known."""
    values: dict[str, Any] = dict.fromkeys(RunStatus.__struct_fields__)
    values.update(run=run.id, directory=str(run.directory), state="UNREADABLE", active=True, attempts=0)
    values["explanation"] = "not known: its directory is damaged"
    return RunStatus(**values)


def observe_run(run: Run, records: Records, seen: Observation, alive: frozenset[str]) -> RunStatus:
    """One run's row out of its records, what Slurm said, and the folders that live local processes name."""
    last = records.job
    evidence = gather_evidence(run, last, records.attempt, seen, alive, finished=records.finished)
    job = evidence.job
    sighting = find_sighting(run, last, seen)
    state, reason = resolve_state(evidence)
    attempt, finished = find_own_attempt(evidence), state == "COMPLETED"
    known = explain_state(state)
    ended = is_ended(state)
    progress = records.progress if attempt is not None else replace(records.progress, seconds_left=None)
    elapsed = job.elapsed_seconds if job and job.state == "RUNNING" else _elapsed(attempt, active=not ended)
    limit = (job.limit_seconds if job else None) or records.limit_seconds
    running = state == "RUNNING"
    name = last.job_id if last and last.backend == "slurm" else run.id  # a local job id is a pid, and may come again
    return RunStatus(
        run=run.id,
        directory=str(run.directory),
        job_id=last.job_id if last else None,
        backend=last.backend if last else None,
        state=state,
        active=not ended,
        reason=reason or None,
        explanation=known.meaning if known else f"in a state this version does not know: {state}",
        next_step=None if finished or not ended else f"lora-jobs resume {name}",
        elapsed_seconds=elapsed,
        limit_seconds=limit,
        step=progress.step,
        total_steps=progress.total_steps,
        loss=progress.loss,
        eval_loss=progress.eval_loss,
        last_committed_step=records.committed_step,
        attempts=len(records.attempts),
        adapter=str(run.adapter) if finished else None,
        remaining_seconds=_remaining(elapsed, limit) if running and last and last.backend == "slurm" else None,
        expected_finish=_finish(progress) if running else None,
        tokens_per_second=progress.tokens_per_second,
        memory_peak_bytes=progress.memory_peak_bytes,
        predicted_bytes=progress.predicted_bytes,
        sweep=find_sweep_name(run),
        **_describe_sighting(sighting, reason),
    )


def describe_job(sighting: Sighting) -> RunStatus:
    """A job of the queue that is no run of ours, in the same columns."""
    job = sighting.job
    known = explain_state(job.state)
    reason = find_end_reason(job) if is_ended(job.state) else job.reason
    nothing = dict.fromkeys(("step", "total_steps", "loss", "eval_loss", "last_committed_step", "adapter"))
    return RunStatus(
        run=job.name,
        directory=None,
        job_id=job.job_id,
        backend="slurm",
        state=job.state,
        active=not is_ended(job.state),
        reason=reason,
        explanation=known.meaning if known else f"in a state this version does not know: {job.state}",
        next_step=None,
        elapsed_seconds=job.elapsed_seconds,
        limit_seconds=job.limit_seconds,
        attempts=0,
        remaining_seconds=_remaining(job.elapsed_seconds, job.limit_seconds) if job.state == "RUNNING" else None,
        **nothing,
        **_describe_sighting(sighting, reason),
    )


def _describe_sighting(sighting: Sighting | None, reason: str | None) -> dict[str, Any]:
    """The fields of a row that only Slurm knows; `reason` is the row's, Slurm's word or that of our own record."""
    if sighting is None:
        return {"priority": None, "partition": None, "expected_start": None}
    job, place = sighting.job, sighting.place
    plain = explain_reason(job.reason)
    ended = is_ended(job.state) and reason == job.reason is not None and plain.known
    return {
        "priority": job.priority,
        "partition": job.partition,
        "expected_start": job.expected_start,
        "reason_text": plain.short if job.pending or ended else None,
        "user": job.user,
        "rank": place.rank if place else None,
        "pending_jobs": place.pending if place else None,
        "factors": asdict(job.factors) if job.factors else None,
        "tasks": None if "_" in job.job_id else sighting.tasks,
        "submitted": job.submitted,
        "started": job.started,
        "ended": job.ended,
    }


def find_sweep_name(run: Run) -> str | None:
    """The name of the sweep that the run is a task of."""
    parent = run.directory.parent
    return parent.name if (parent / SWEEP_FILE).is_file() else None


def _elapsed(attempt: Attempt | None, *, active: bool) -> float | None:
    if attempt is None or (attempt.ended_at is None and not active):
        return None
    return round((attempt.ended_at or time.time()) - attempt.started_at, 1)


def _remaining(elapsed: float | None, limit: int | None) -> float | None:
    return None if elapsed is None or limit is None else max(0.0, limit - elapsed)


def _finish(progress: Progress) -> str | None:
    if progress.seconds_left is None or progress.written_at is None:
        return None
    return datetime.fromtimestamp(progress.written_at + progress.seconds_left).isoformat(timespec="seconds")
