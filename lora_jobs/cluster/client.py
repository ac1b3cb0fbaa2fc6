"""Questions to Slurm and orders for it. One call answers for all jobs; what can't be read is said, never invented."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from lora_jobs.cluster.commands import find_query_seconds, run_command
from lora_jobs.cluster.parsers import (
    SACCT_FORMAT,
    SPRIO_FORMAT,
    Factors,
    SlurmJob,
    is_job_id,
    match_ids,
    parse_sacct,
    parse_sprio,
    parse_test_only,
)
from lora_jobs.cluster.refusals import clean_message, explain_refusal
from lora_jobs.errors import ClusterError, CommandError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

ORDER_SECONDS = 90.0
NO_SUCH_JOB = "Invalid job id"


class SubmissionTest(Struct, frozen=True):
    """What `sbatch --test-only` says: accepted with a forecast, or refused in plain words."""

    accepted: bool
    expected_start: str | None
    message: str
    hint: str | None = None


def check_submission(script: Path) -> SubmissionTest:
    """Ask Slurm whether it would take this very script, and when it would start; nothing is queued.

    Errors: CommandError when sbatch is not there or does not answer.
    """
    answer = run_command(["sbatch", "--test-only", str(script)], timeout=ORDER_SECONDS)
    text = f"{answer.stdout}\n{answer.stderr}"
    if answer.returncode != 0:
        refusal = explain_refusal(text)
        return SubmissionTest(False, None, refusal.message, refusal.hint)
    return SubmissionTest(True, parse_test_only(text), clean_message(text))


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


def ask_sacct(ids: Sequence[str], notes: list[str]) -> list[SlurmJob]:
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
    wanted = frozenset(ids)
    found = {job_id: parts for row, parts in rows.items() for job_id in match_ids(row, wanted)}
    # An array whose tasks all wait stands under its own id alone.
    of_array = {job_id: parts for job_id in ids if (parts := rows.get(job_id.partition("_")[0])) is not None}
    return {**of_array, **found}
