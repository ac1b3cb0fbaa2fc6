"""While a run trains: rank 0 holds its lease, and each rank has a watch that ends it when it hangs."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING

from lora_jobs.checkpoints import MANIFEST, find_step, list_checkpoints
from lora_jobs.errors import RunError
from lora_jobs.runs import append_metrics, release_lease, renew_lease, take_lease
from lora_jobs.runs.lease import RENEW_SECONDS
from lora_jobs.training.hang import HangWatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lora_jobs.runs import Attempt, Lease, Run
    from lora_jobs.training.launch import Launch


@contextlib.contextmanager
def hold_training(run: Run, attempt: Attempt, launch: Launch, *, hang_seconds: float) -> Iterator[HangWatch]:
    """The lease (in rank 0) and the watch, until the block ends. Raises RunError where another job trains the run."""
    lease = take_lease(run, job_id=launch.job_id, restart_count=launch.restart_count) if launch.rank == 0 else None
    if lease is not None:
        try:
            refuse_stale_choice(run, attempt)
        except BaseException:
            release_lease(run, lease)
            raise
    watch = HangWatch(hang_seconds, rank=launch.rank)
    note = {"kind": "note", "event": "hang", "attempt": attempt.number, "rank": launch.rank, "host": launch.host}

    def report(reason: str) -> None:
        with contextlib.suppress(RunError):
            append_metrics(run, {"time": time.time(), **note, "reason": reason})

    watch.report = report
    if lease is not None:
        watch.every_tick = build_renewal(run, lease)
    watch.start()
    try:
        yield watch
    finally:
        watch.stop()
        if lease is not None:
            with contextlib.suppress(RunError):
                release_lease(run, lease)


def refuse_stale_choice(run: Run, attempt: Attempt) -> None:
    """RunError where another job committed a newer checkpoint after this one had chosen: the lease came later."""
    committed = [path for path in list_checkpoints(run.checkpoints) if (path / MANIFEST).exists()]
    if committed and (find_step(committed[0]) or 0) > attempt.first_step:
        chosen = attempt.resume_from or "the base model"
        raise RunError(
            f"{committed[0].name} was committed by another job after this one had chosen {chosen}",
            hint=f"the next start chooses it: lora-jobs resume {run.id}",
        )


def build_renewal(run: Run, lease: Lease) -> Callable[[], None]:
    """What renews the lease now and then; it ends this process once another job holds the run."""
    last = time.monotonic()

    def renew() -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < RENEW_SECONDS:
            return
        last = now
        # A disk that is full or away for a moment is no reason to stop: the lease is good for some renewals.
        with contextlib.suppress(RunError):
            if not renew_lease(run, lease):
                print(f"lora-jobs: another job has taken over {run.id}: this one stops", file=sys.stderr, flush=True)
                os._exit(RunError.exit_code)

    return renew
