"""Questions to Slurm and orders for it. One call answers for all jobs; what can't be read is said, never invented."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_jobs.cluster.commands import find_query_seconds, run_command
from lora_jobs.cluster.parsers import (
    SACCT_FORMAT,
    SPRIO_FORMAT,
    SQUEUE_FORMAT,
    Factors,
    SlurmJob,
    is_job_id,
    match_job,
    parse_sacct,
    parse_sprio,
    parse_squeue,
    parse_test_only,
)
from lora_jobs.cluster.refusals import clean_message, explain_refusal
from lora_jobs.errors import ClusterError, CommandError
from lora_jobs.runs import is_ended

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

ORDER_SECONDS = 90.0
NO_SUCH_JOB = "Invalid job id"


@dataclass(frozen=True, slots=True)
class JobAnswers:
    """The jobs that Slurm knows, by the id that was asked for, and what could not be read."""

    jobs: dict[str, SlurmJob]
    notes: tuple[str, ...] = ()
    queue_answered: bool = True
    """False when squeue could not be asked: a job that is missing here may well be alive."""


@dataclass(frozen=True, slots=True)
class SubmissionTest:
    """What `sbatch --test-only` says: accepted with a forecast, or refused in plain words."""

    accepted: bool
    expected_start: str | None
    message: str
    hint: str | None = None


def find_jobs(ids: Sequence[str]) -> JobAnswers:
    """What Slurm knows of these jobs: one squeue, one sprio if any waits, one sacct for those squeue doesn't know.

    Never raises for a Slurm that is away: its jobs are missing from the answer and the notes say why.
    """
    wanted = [job_id for job_id in dict.fromkeys(ids) if is_job_id(job_id)]
    if not wanted:
        return JobAnswers({})
    notes: list[str] = []
    queue = _ask_squeue(wanted, notes)
    jobs = {job_id: job for job_id in wanted if (job := last_match(queue or [], job_id)) is not None}
    if waiting := [job_id for job_id, job in jobs.items() if job.state == "PENDING"]:
        jobs.update(_add_factors({job_id: jobs[job_id] for job_id in waiting}, notes))
    if missing := [job_id for job_id in wanted if job_id not in jobs]:
        past = ask_sacct(missing, notes)
        found = {job_id: job for job_id in missing if (job := last_match(past, job_id)) is not None}
        # The queue forgets a job only once it is over: accounting that still calls it alive has missed its end.
        stale = {job_id for job_id, job in found.items() if queue is not None and not is_ended(job.state)}
        jobs.update({job_id: job for job_id, job in found.items() if job_id not in stale})
        notes += [
            f"job {job_id}: accounting still says {found[job_id].state}, the queue no longer holds it"
            for job_id in sorted(stale)
        ]
    return JobAnswers(jobs, tuple(notes), queue_answered=queue is not None)


def check_submission(script: Path) -> SubmissionTest:
    """Ask Slurm whether it would take this very script, and when it would start; nothing is queued.

    Errors: CommandError when sbatch is not there or does not answer.
    """
    answer = run_command(["sbatch", "--test-only", str(script)], timeout=ORDER_SECONDS)
    text = f"{answer.stdout}\n{answer.stderr}"
    if answer.returncode != 0:
        refusal = explain_refusal(text)
        return SubmissionTest(False, None, refusal.message, refusal.hint)
    forecast = parse_test_only(text)
    return SubmissionTest(True, forecast.expected_start if forecast else None, clean_message(text))


def cancel_job(job_id: str, signal: str | None = None) -> None:
    """End a job, or send its tasks a signal such as "USR2". Errors: ClusterError."""
    options = [f"--signal={signal}"] if signal else []
    _order(
        ["scancel", *options, job_id], f"job {job_id} can't be cancelled" if not signal else f"no {signal} to {job_id}"
    )


def requeue_job(job_id: str) -> None:
    """Put a job back into the queue under its id. Errors: ClusterError, also once Slurm has forgotten the job."""
    _order(["scontrol", "requeue", job_id], f"job {job_id} can't be requeued")


def _order(argv: list[str], failed: str) -> None:
    job_id = argv[-1]
    if not is_job_id(job_id):
        raise ClusterError(f"not a Slurm job id: {job_id!r}")
    answer = run_command(argv, timeout=ORDER_SECONDS)
    # scancel ends with 0 for a job that is gone, and says so on stderr.
    if answer.returncode != 0 or "error:" in answer.stderr:
        refusal = explain_refusal(answer.stderr or answer.stdout)
        raise ClusterError(f"{failed}: {refusal.message}", hint=refusal.hint)


def _ask_squeue(ids: list[str], notes: list[str]) -> list[SlurmJob] | None:
    """Rows of squeue, ended jobs that it still holds included; None when it could not be asked."""
    argv = ["squeue", "-h", "--states=all", "-o", SQUEUE_FORMAT, "-j", ",".join(ids)]
    try:
        answer = run_command(argv, timeout=find_query_seconds())
        if answer.returncode == 0:
            return parse_squeue(answer.stdout)
        if NO_SUCH_JOB in answer.stderr:
            return []
        notes.append(f"queue not readable: {explain_refusal(answer.stderr).message}")
    except ClusterError as error:
        notes.append(f"queue not readable: {error.message}")
    return None


def ask_sacct(ids: list[str], notes: list[str]) -> list[SlurmJob]:
    """Rows of sacct, one per start of a job that was requeued; none, and a note, when it can't be read."""
    argv = ["sacct", "-X", "-D", "-P", "-n", "-o", SACCT_FORMAT, "-j", ",".join(ids)]
    try:
        answer = run_command(argv, timeout=find_query_seconds())
        if answer.returncode == 0:
            return parse_sacct(answer.stdout)
        notes.append(f"past jobs not readable: {explain_refusal(answer.stderr).message}")
    except ClusterError as error:
        notes.append(f"past jobs not readable: {error.message}")
    return []


def _add_factors(jobs: dict[str, SlurmJob], notes: list[str]) -> dict[str, SlurmJob]:
    """The same jobs with the parts of their priority, where sprio knows them."""
    factors = ask_sprio(list(jobs), notes)
    return {job_id: replace(job, factors=factors.get(job_id)) for job_id, job in jobs.items()}


def ask_sprio(ids: Sequence[str], notes: list[str]) -> dict[str, Factors]:
    """The parts of the priority by job, by one sprio; none, and a note, when it can't be read."""
    argv = [
        "sprio",
        "-h",
        "-o",
        SPRIO_FORMAT,
        "-j",
        ",".join(dict.fromkeys(job_id.partition("_")[0] for job_id in ids)),
    ]
    try:
        answer = run_command(argv, timeout=find_query_seconds())
        gone = "Unable to find jobs" in answer.stdout + answer.stderr
        if answer.returncode != 0 and not gone:
            raise CommandError(clean_message(answer.stderr) or f"sprio ended with {answer.returncode}")
        rows = parse_sprio("" if gone else answer.stdout)
    except ClusterError as error:
        notes.append(f"priority not readable: {error.message}")
        return {}
    found = {}
    for job_id in ids:
        base = job_id.partition("_")[0]
        match = next((parts for row, parts in rows.items() if row == base or match_job(row, job_id)), None)
        if match is not None:
            found[job_id] = match
    return found


def last_match(rows: list[SlurmJob], job_id: str) -> SlurmJob | None:
    """The row that stands for a job; of several (one per attempt) the one submitted or started last."""
    matches = [row for row in rows if row.job_id == job_id] or [row for row in rows if match_job(row.job_id, job_id)]
    return max(matches, key=lambda row: row.started or row.submitted or "", default=None)
