"""Interrupt a run, resume it, and measure what was lost."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fault_ranks import STUCK_SECONDS, wait_or_end
from tiny_runs import TIMEOUT_SECONDS, Job, RankServer, hash_adapter, read_logs

from lora_jobs.checkpoints import choose_checkpoint
from lora_jobs.runs import EXIT_SAVED, Run, Submission, append_submission, load_attempts, load_metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True)
class Interrupted:
    """How the ranks of one start ended, and how many finished steps were not committed by then."""

    codes: list[int]
    hung: bool
    lost_steps: int

    @property
    def saved(self) -> bool:
        return set(self.codes) == {EXIT_SAVED}


def find_lost_steps(run: Run) -> int:
    """Steps that were trained in the last attempt and come after the newest good checkpoint."""
    if not (attempts := load_attempts(run)):
        return 0
    number = attempts[-1].number
    trained = [row["step"] for row in load_metrics(run) if row["kind"] == "train" and row["attempt"] == number]
    choice = choose_checkpoint(run.checkpoints)
    committed = choice.verdicts[-1].step if choice.chosen else 0
    return max(0, max(trained, default=0) - (committed or 0))


def note_start(run: Run) -> None:
    """Record a start by hand, as `lora-jobs resume` does: what counts starts without a new step begins anew."""
    number = max((attempt.number for attempt in load_attempts(run)), default=0)
    append_submission(run, Submission("test", "local", time.time(), socket.gethostname(), after_attempt=number))


def interrupt(
    server: RankServer,
    run: Run,
    ranks: int,
    *,
    faults: dict[int, Sequence[dict[str, Any]]] | None = None,
    meanwhile: Callable[[Job], None] | None = None,
    by_hand: bool = True,
    patience: float = STUCK_SECONDS,
) -> Interrupted:
    """One start with faults in the ranks, or with something done to them from outside."""
    if by_hand:
        note_start(run)
    job = server.start(run, ranks, faults)
    if meanwhile is not None:
        meanwhile(job)
    codes, hung = wait_or_end(job, patience=patience)
    return Interrupted(codes, hung, find_lost_steps(run))


def finish(server: RankServer, run: Run, ranks: int) -> str:
    """Train to the end without a fault; the adapter's hash."""
    note_start(run)
    codes, hung = wait_or_end(server.start(run, ranks))
    assert codes == [0] * ranks, read_logs(run)
    assert not hung
    return hash_adapter(run)


def wait_until_begun(run: Run, known: int = 0) -> None:
    """Return once this start's attempt is on record: from here on the ranks listen to signals."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while len(load_attempts(run)) <= known:
        assert time.monotonic() < deadline, read_logs(run)
        time.sleep(0.005)
