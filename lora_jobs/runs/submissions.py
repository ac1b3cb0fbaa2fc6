"""Every job a run was handed to: one line per sbatch or local launch, written by the submitter."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from lora_jobs.runs.durable import append_line, load_lines
from lora_jobs.runs.records import read_record

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lora_jobs.runs.store import Run

Backend = Literal["slurm", "local"]


@dataclass(frozen=True, slots=True)
class Submission:
    """One job: times in seconds since 1970; `pid_created_at` tells a local process from a later one of the same id."""

    job_id: str
    backend: Backend
    submitted_at: float
    host: str
    pid_created_at: float | None = None
    cluster: str | None = None


_TYPES: dict[str, type | tuple[type, ...]] = {
    "job_id": str,
    "backend": str,
    "submitted_at": (int, float),
    "host": str,
    "pid_created_at": (int, float),
    "cluster": str,
}


def append_submission(run: Run, submission: Submission) -> None:
    """Records the job. Raises RunError."""
    append_line(run.submissions_path, asdict(submission))


def load_submissions(run: Run) -> list[Submission]:
    """All jobs of the run, oldest first. Raises RunError."""
    return parse_submissions(load_lines(run.submissions_path))


def parse_submissions(records: Iterable[Mapping[str, Any]]) -> list[Submission]:
    """The submissions among JSON records."""
    found = (read_record(Submission, record, _TYPES) for record in records)
    return [submission for submission in found if submission is not None]
