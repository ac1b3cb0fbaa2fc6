"""A look at many runs: their own records, and one question per Slurm command for all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from lora_jobs.checkpoints import list_checkpoints, verify_checkpoint
from lora_jobs.cluster.observation import observe_jobs
from lora_jobs.errors import LoraJobsError
from lora_jobs.runs import load_attempts
from lora_jobs.workflows.evidence import list_jobs
from lora_jobs.workflows.progress import load_limit, read_progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_jobs.cluster.observation import Observation
    from lora_jobs.runs import Attempt, Run, Submission
    from lora_jobs.workflows.progress import Progress


class Records(Struct, frozen=True):
    """What a run's directory holds, each file read once: jobs and attempts oldest first, and how far it came."""

    jobs: list[Submission]
    attempts: list[Attempt]
    finished: bool
    committed_step: int | None
    limit_seconds: int | None
    progress: Progress

    @property
    def job(self) -> Submission | None:
        return self.jobs[-1] if self.jobs else None

    @property
    def attempt(self) -> Attempt | None:
        return self.attempts[-1] if self.attempts else None

    @property
    def is_over(self) -> bool:
        """Finished, and the last attempt recorded its end: there is nothing to ask."""
        return self.finished and self.attempt is not None and self.attempt.has_ended


class Look(Struct, frozen=True):
    """Runs, the records of each by run id (none for a damaged directory), and what Slurm said."""

    runs: tuple[Run, ...]
    records: dict[str, Records]
    seen: Observation
    notes: tuple[str, ...]

    @property
    def has_local(self) -> bool:
        return any(records.job is not None and records.job.backend == "local" for records in self.records.values())


def look_at_runs(
    runs: Sequence[Run], *, user: str | None = None, past: Sequence[str] = (), ranked: bool = True, factors: bool = True
) -> Look:
    """One squeue, one sprio and one sacct at the most, for the newest job of each run that may not be over.

    `user`, `past`, `ranked` and `factors` as `observe_jobs` has them. A run that can't be read is a note and hides no
    other.
    """
    records, notes = {}, []
    for run in runs:
        try:
            records[run.id] = read_records(run)
        except LoraJobsError as error:
            notes.append(f"{run.id} can't be read: {error.message}")
    newest = [found.job for found in records.values() if found.job is not None and not found.is_over]
    ids = [job.job_id for job in newest if job.backend == "slurm"]
    seen = observe_jobs(ids, users=(user,) if user else (), past=past, ranked=ranked, factors=factors)
    return Look(tuple(runs), records, seen, (*seen.notes, *notes))


def read_records(run: Run) -> Records:
    """Raises RunError, CheckpointError."""
    attempts = load_attempts(run)
    return Records(
        jobs=list_jobs(run, attempts),
        attempts=attempts,
        finished=is_finished(run),
        committed_step=find_committed_step(run),
        limit_seconds=load_limit(run),
        progress=read_progress(run, attempts[-1] if attempts else None),
    )


def is_finished(run: Run) -> bool:
    """True when the adapter is whole (sizes compared)."""
    return run.adapter.is_dir() and verify_checkpoint(run.adapter, level=0).good


def find_committed_step(run: Run) -> int | None:
    """The step of the newest checkpoint that is committed and whole by its sizes."""
    for directory in list_checkpoints(run.checkpoints):
        verdict = verify_checkpoint(directory, level=0)
        if verdict.good:
            return verdict.step
    return None
