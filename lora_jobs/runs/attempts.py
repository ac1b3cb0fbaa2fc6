"""Every start of a run: one line per attempt, written by the job alone.

An attempt is known by its job id and Slurm's restart count. One without an end whose job is gone was killed.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Literal

from msgspec import Struct
from msgspec.structs import asdict, replace

from lora_jobs.errors import RunError
from lora_jobs.runs.durable import append_line, load_lines, render_lines, write_atomic
from lora_jobs.runs.records import read_record

if TYPE_CHECKING:
    from lora_jobs.runs.store import Run

_NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)
Backend = Literal["slurm", "local"]

RUNNING = "RUNNING"
COMPLETED = "COMPLETED"
SAVED = "SAVED"
FAILED = "FAILED"


class Attempt(Struct, frozen=True):
    """One start: `resume_from` is a directory's name such as checkpoint-20; times are seconds since 1970.

    `cause` is the name of a row of runs.causes; `bad_node` the node that the next attempt should do without;
    `world_size` how many processes were asked for, each with a GPU, which a resume may change.
    """

    number: int
    job_id: str
    restart_count: int
    backend: Backend
    state: str
    host: str
    started_at: float
    ended_at: float | None = None
    resume_from: str | None = None
    first_step: int = 0
    last_committed_step: int | None = None
    exit_code: int | None = None
    reason: str | None = None
    cause: str | None = None
    bad_node: str | None = None
    world_size: int | None = None

    @property
    def has_ended(self) -> bool:
        return self.ended_at is not None


def load_attempts(run: Run) -> list[Attempt]:
    """All attempts of the run, oldest first. Raises RunError."""
    found = (read_record(Attempt, record) for record in load_lines(run.attempts_path))
    return [attempt for attempt in found if attempt is not None]


def find_attempt(run: Run, *, job_id: str, restart_count: int) -> Attempt | None:
    """The attempt of this job and restart, or None."""
    for attempt in load_attempts(run):
        if (attempt.job_id, attempt.restart_count) == (job_id, restart_count):
            return attempt
    return None


def find_bad_nodes(run: Run, *, most: int = 4) -> list[str]:
    """The nodes that failed last, to be left out of the next start; not more, or a small cluster has none left."""
    named = [attempt.bad_node for attempt in load_attempts(run) if attempt.backend == "slurm" and attempt.bad_node]
    nodes = [name for name in named if _NODE_NAME.fullmatch(name)]
    return list(dict.fromkeys(reversed(nodes)))[:most]


def begin_attempt(
    run: Run,
    *,
    job_id: str,
    restart_count: int,
    backend: Backend,
    host: str,
    resume_from: str | None,
    first_step: int,
    world_size: int | None = None,
    refused: str | None = None,
) -> Attempt:
    """Records that the run starts; the same job and restart begin only once. Raises RunError.

    `refused` is why it can't: its line is never one of a running attempt, which the other ranks would go on with.
    """
    attempts = load_attempts(run)
    for attempt in attempts:
        if (attempt.job_id, attempt.restart_count) == (job_id, restart_count):
            return attempt
    now = time.time()
    attempt = Attempt(
        number=max((attempt.number for attempt in attempts), default=0) + 1,
        job_id=job_id,
        restart_count=restart_count,
        backend=backend,
        state=RUNNING if refused is None else FAILED,
        host=host,
        started_at=now,
        ended_at=None if refused is None else now,
        reason=refused,
        resume_from=resume_from,
        first_step=first_step,
        world_size=world_size,
    )
    append_line(run.attempts_path, asdict(attempt))
    return attempt


def end_attempt(
    run: Run,
    *,
    job_id: str,
    restart_count: int,
    exit_code: int,
    state: str,
    reason: str | None,
    last_committed_step: int | None,
    cause: str | None = None,
    bad_node: str | None = None,
) -> Attempt:
    """Records how the attempt ended, rewriting the file as a whole. Raises RunError where it never began."""
    attempts = load_attempts(run)
    for index, attempt in enumerate(attempts):
        if (attempt.job_id, attempt.restart_count) == (job_id, restart_count):
            ended = replace(
                attempt,
                ended_at=time.time(),
                exit_code=exit_code,
                state=state,
                reason=reason,
                last_committed_step=last_committed_step,
                cause=cause,
                bad_node=bad_node,
            )
            attempts[index] = ended
            write_atomic(run.attempts_path, render_lines([asdict(each) for each in attempts]))
            return ended
    raise RunError(f"{run.attempts_path}: no attempt of job {job_id} (restart {restart_count}) has begun")
