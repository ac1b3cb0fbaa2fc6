"""Every job a run was handed to: one line per sbatch or local launch, written by the submitter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import asdict

from lora_jobs.runs.attempts import Backend, load_attempts
from lora_jobs.runs.durable import append_line, load_lines
from lora_jobs.runs.records import read_record

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lora_jobs.runs.attempts import Attempt
    from lora_jobs.runs.store import Run


class Submission(Struct, frozen=True):
    """One start by hand: times in seconds since 1970; `pid_created_at` tells a process from a later one of its id.

    `after_attempt` is the number of the run's last attempt until then: what comes later belongs to this start.
    """

    job_id: str
    backend: Backend
    submitted_at: float
    host: str
    pid_created_at: float | None = None
    after_attempt: int = 0


def append_submission(run: Run, submission: Submission) -> None:
    """Records the job. Raises RunError."""
    append_line(run.submissions_path, asdict(submission))


def load_submissions(run: Run) -> list[Submission]:
    """All jobs of the run, oldest first. Raises RunError."""
    return parse_submissions(load_lines(run.submissions_path))


def parse_submissions(records: Iterable[Mapping[str, Any]]) -> list[Submission]:
    """The submissions among JSON records."""
    found = (read_record(Submission, record) for record in records)
    return [submission for submission in found if submission is not None]


def list_recent_attempts(run: Run) -> list[Attempt]:
    """The attempts since the run was last started by hand, oldest first. Raises RunError."""
    known = load_submissions(run)
    before = known[-1].after_attempt if known else 0
    return [attempt for attempt in load_attempts(run) if attempt.number > before]
