"""The state of a run, decided from everything that is known of its newest job. No answer is never taken for "dead"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from lora_jobs.cluster.reasons import explain_reason
from lora_jobs.runs import is_ended

if TYPE_CHECKING:
    from lora_jobs.cluster.parsers import SlurmJob
    from lora_jobs.runs import Attempt, Submission

# Where Slurm only knows an exit code, the attempt's own record says more.
LESS_THAN_OUR_RECORD = frozenset({"FAILED", "COMPLETED"})
# squeue and sacct keep what a job last waited for (sacct(1), Reason); only these say why it is over.
ENDING_REASONS = frozenset({
    "RaisedSignal", "NonZeroExitCode", "TimeLimit", "OutOfMemory", "InactiveLimit", "JobLaunchFailure", "SystemFailure",
    "NodeDown", "DeadLine", "DependencyNeverSatisfied",
})  # fmt: skip
BROKEN_ADAPTER = "it ended well, but its adapter is missing or damaged"


class Evidence(Struct, frozen=True):
    """What is known: the newest submission and attempt, Slurm's row for the job, this machine's processes."""

    submission: Submission | None
    attempt: Attempt | None
    job: SlurmJob | None = None
    queue_answered: bool = True
    has_processes: bool = False
    is_here: bool = True
    """The local run was started on this machine."""
    waits_for_turn: bool = False
    """A task of a sweep on this machine that is not started yet, while the process that starts them lives."""
    is_finished: bool = False
    """The adapter is there and whole."""


def resolve_state(known: Evidence) -> tuple[str, str | None]:
    """State and reason. Source of the states: runs.policy; Slurm's own keep Slurm's spelling."""
    backend = known.submission.backend if known.submission else known.attempt.backend if known.attempt else None
    if backend is None and known.waits_for_turn:
        return "PENDING", "its turn in the sweep"
    if backend is None:
        return ("COMPLETED", None) if known.is_finished else ("NOT_SUBMITTED", None)
    return resolve_local(known) if backend == "local" else resolve_slurm(known)


def resolve_local(known: Evidence) -> tuple[str, str | None]:
    """A run on a machine: living processes first, then the adapter, then the record."""
    if known.has_processes:
        return "RUNNING", None
    if known.is_finished:
        return "COMPLETED", None
    attempt = find_own_attempt(known)
    if not known.is_here and (attempt is None or attempt.ended_at is None):
        host = known.submission.host if known.submission else attempt.host if attempt else "another machine"
        return "ELSEWHERE", f"started on {host}: ask there"
    if attempt is None:
        return "FAILED", "ended before training began"
    return resolve_record(attempt)


def resolve_slurm(known: Evidence) -> tuple[str, str | None]:
    """A job of Slurm: alive as long as Slurm says so; once it has ended our record may know better why."""
    job, attempt = known.job, find_own_attempt(known)
    if job is not None and not is_ended(job.state):
        return job.state, job.reason
    if known.is_finished:
        return "COMPLETED", None
    if job is not None:
        return resolve_ended_job(job, attempt)
    if not known.queue_answered:
        return "UNREACHABLE", "Slurm does not answer: the job may be waiting or running"
    if attempt is None:
        return "UNKNOWN", "Slurm no longer knows the job"
    return resolve_record(attempt)


def resolve_ended_job(job: SlurmJob, attempt: Attempt | None) -> tuple[str, str | None]:
    """Slurm's state for a job that is over, with the reason that was recorded where there is one."""
    if attempt is None or attempt.ended_at is None:
        return ("FAILED", BROKEN_ADAPTER) if job.state == "COMPLETED" else (job.state, find_end_reason(job))
    if job.state in LESS_THAN_OUR_RECORD:
        return resolve_record(attempt)
    return job.state, attempt.reason or find_end_reason(job)


def find_end_reason(job: SlurmJob) -> str | None:
    """Slurm's reason for the end of a job; None where it is only what the job waited for before it began."""
    reason = explain_reason(job.reason)
    return None if reason.known and reason.code not in ENDING_REASONS else job.reason


def resolve_record(attempt: Attempt) -> tuple[str, str | None]:
    """What an attempt's own record says; one without an end was killed."""
    if attempt.ended_at is None:
        return "KILLED", None
    if attempt.state == "COMPLETED":
        return "FAILED", BROKEN_ADAPTER
    return attempt.state, attempt.reason


def find_own_attempt(known: Evidence) -> Attempt | None:
    """The newest attempt if it belongs to the newest job."""
    attempt = known.attempt
    if attempt is None or known.submission is None or attempt.job_id == known.submission.job_id:
        return attempt
    return None
