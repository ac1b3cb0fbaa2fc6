"""A look at many runs: their own records, and one question per Slurm command for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_jobs.checkpoints import list_checkpoints, verify_checkpoint
from lora_jobs.cluster.observation import observe_jobs
from lora_jobs.errors import LoraJobsError
from lora_jobs.runs import load_attempts
from lora_jobs.workflows.evidence import list_jobs
from lora_jobs.workflows.progress import load_limit, read_progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_jobs.cluster.observation import Observation
    from lora_jobs.runs import Run, Submission


@dataclass(frozen=True, slots=True)
class Look:
    """Runs, the jobs of each by run id (none for a damaged directory), which are finished, and what Slurm said."""

    runs: tuple[Run, ...]
    jobs: dict[str, list[Submission]]
    finished: dict[str, bool]
    seen: Observation
    notes: tuple[str, ...]

    @property
    def has_local(self) -> bool:
        return any(jobs and jobs[-1].backend == "local" for jobs in self.jobs.values())


def look_at_runs(
    runs: Sequence[Run], *, user: str | None = None, past: Sequence[str] = (), ranked: bool = True
) -> Look:
    """One squeue, one sprio and one sacct at the most, for the newest job of each run that may not be over.

    `user`, `past` and `ranked` as `observe_jobs` has them.
    """
    jobs, damaged = read_jobs(runs)
    finished = {run.id: is_finished(run) for run in runs}
    ids = [
        known[-1].job_id
        for run in runs
        if (known := jobs.get(run.id)) and known[-1].backend == "slurm"
        if not (finished[run.id] and has_ended(run))
    ]
    seen = observe_jobs(ids, users=(user,) if user else (), past=past, ranked=ranked)
    return Look(tuple(runs), jobs, finished, seen, (*seen.notes, *damaged))


def read_jobs(runs: Sequence[Run]) -> tuple[dict[str, list[Submission]], tuple[str, ...]]:
    """The jobs of each run, and a note for each run whose directory can't be read; it does not hide the others."""
    jobs, notes = {}, []
    for run in runs:
        try:
            find_committed_step(run), load_limit(run), read_progress(run, None)
            jobs[run.id] = list_jobs(run)
        except LoraJobsError as error:
            notes.append(f"{run.id} can't be read: {error.message}")
    return jobs, tuple(notes)


def has_ended(run: Run) -> bool:
    """True when the run's last attempt recorded its end."""
    attempts = load_attempts(run)
    return bool(attempts) and attempts[-1].has_ended


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
