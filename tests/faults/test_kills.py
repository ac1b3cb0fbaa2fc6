"""kill -9 at random moments, of one rank, of all, of what starts them: the run ends as if nothing had happened."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest
from fault_ranks import KINDS, SAVE_STEPS, wait_or_end
from interruptions import Interrupted, find_lost_steps, finish, interrupt
from outside import Batch, Launched
from tiny_runs import Job, RankServer, create_tiny_run, hash_adapter, read_logs

from lora_jobs.checkpoints import verify_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lora_jobs.runs import Run

pytestmark = pytest.mark.train

KILLS_PER_RUN = 4
# The launcher ends the ranks that are left 30 s after one has failed, srun 60 s after. A rank whose peer is killed
# before they have met waits for it until then; here it is not given as long.
LAUNCHER_SECONDS = 10.0
LONG = os.environ.get("LORA_JOBS_FAULTS") == "long"
KILLS = int(os.environ.get("LORA_JOBS_FAULTS_KILLS", "300")) if LONG else 6
NAMES = list(KINDS)
# Some of the kills are of the launcher or the batch shell, each in runs of their own; the short form has none of them.
OUTSIDE = {"launcher": Launched, "batch shell": Batch}
OUTSIDE_RUNS = (2 if KILLS >= 100 else 1) if LONG else 0
RANK_KILLS = max(KILLS - len(OUTSIDE) * OUTSIDE_RUNS * KILLS_PER_RUN, KILLS_PER_RUN)
# To start a launcher or a shell and what it starts takes so much longer than to fork ranks: Python and its libraries.
START_SECONDS = 15.0


@pytest.fixture(scope="module")
def whole(
    server: RankServer, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[str, float]]:
    """Hash and duration in seconds of an uninterrupted run of each kind."""
    root = tmp_path_factory.mktemp("whole")
    made: dict[str, tuple[str, float]] = {}

    def get(kind: str) -> tuple[str, float]:
        if kind not in made:
            sections, ranks = KINDS[kind]
            run = create_tiny_run(root, f"{kind}-1", tiny, **sections)
            began = time.monotonic()
            codes, _ = wait_or_end(server.start(run, ranks))
            assert codes == [0] * ranks, read_logs(run)
            made[kind] = (hash_adapter(run), time.monotonic() - began)
        return made[kind]

    return get


@pytest.mark.parametrize("number", range(-(-RANK_KILLS // KILLS_PER_RUN)))
def test_kill_9_at_random_moments_changes_nothing(
    number: int,
    server: RankServer,
    tiny: Path,
    tmp_path: Path,
    whole: Callable[[str], tuple[str, float]],
    record: Callable[..., None],
) -> None:
    """Killed four times in a row, then left to end; one that ends before its kill is compared, and another begun."""
    chance = random.Random(number)  # noqa: S311 - repeatable
    kind = NAMES[number % len(NAMES)]
    reference, longest = whole(kind)
    sections, ranks = KINDS[kind]
    names = (f"{kind}-{count}" for count in itertools.count(1))
    run = create_tiny_run(tmp_path, next(names), tiny, **sections)
    told: dict[str, Any] = {"kills": 0, "one_rank": 0, "ended_by_launcher": 0, "worst_lost_steps": 0}
    results = []

    while told["kills"] < min(KILLS_PER_RUN, RANK_KILLS - number * KILLS_PER_RUN):
        victims = [chance.randrange(ranks)] if chance.random() < 0.5 else None
        ended = interrupt_after(server, run, ranks, chance.uniform(0.05, longest), victims)
        if ended is None:
            results.append(hash_adapter(run))
            run = create_tiny_run(tmp_path, next(names), tiny, **sections)
            longest *= 0.7  # a resumed run is shorter than a whole one
            continue
        told["kills"] += 1
        told["one_rank"] += victims is not None and ranks > 1
        told["ended_by_launcher"] += ended.hung
        told["worst_lost_steps"] = max(told["worst_lost_steps"], ended.lost_steps)
    whole_already = run.adapter.exists() and verify_checkpoint(run.adapter).good
    results.append(hash_adapter(run) if whole_already else finish(server, run, ranks))
    same = set(results) == {reference}

    record(
        "kill", f"{kind} {number}", kind=kind, victim="ranks", ours="same result" if same else "other result", **told
    )
    assert same
    assert told["worst_lost_steps"] <= SAVE_STEPS


def interrupt_after(
    server: RankServer, run: Run, ranks: int, seconds: float, victims: list[int] | None
) -> Interrupted | None:
    """Kill after so many seconds; None where the run was faster than that."""
    killed: list[int] = []

    def kill(job: Job) -> None:
        time.sleep(seconds)
        for rank in range(ranks) if victims is None else victims:
            pid = job.pids[rank]
            code = server.ask({"poll": pid})["code"]
            if code is not None:
                job.codes[pid] = code
                continue
            job.kill(signal.SIGKILL, ranks=[rank])
            killed.append(rank)

    ended = interrupt(server, run, ranks, meanwhile=kill, patience=LAUNCHER_SECONDS)
    return ended if killed else None


@pytest.mark.parametrize("number", range(OUTSIDE_RUNS))
@pytest.mark.parametrize("victim", OUTSIDE)
def test_kill_9_of_what_starts_the_ranks(
    victim: str,
    number: int,
    tiny: Path,
    tmp_path: Path,
    whole: Callable[[str], tuple[str, float]],
    record: Callable[..., None],
) -> None:
    """The launcher, whose ranks train on without it; the batch shell, whose job Slurm then ends."""
    chance = random.Random(number)  # noqa: S311 - repeatable
    reference, longest = whole("plain")
    longest += START_SECONDS
    starts = OUTSIDE[victim](tmp_path, tiny, KINDS["plain"][0])
    told = {"kills": 0, "one_rank": 0, "worst_lost_steps": 0}
    results = []

    run = starts.create()
    while told["kills"] < KILLS_PER_RUN:
        if not starts.kill(run, chance.uniform(0.05, longest), chance):
            longest *= 0.7
        else:
            told["kills"] += 1
            told["worst_lost_steps"] = max(told["worst_lost_steps"], find_lost_steps(run))
        if run.adapter.exists() and verify_checkpoint(run.adapter).good:
            results.append(hash_adapter(run))
            run = starts.create()
        else:
            starts.start(run)
    starts.wait(run)
    results.append(hash_adapter(run))
    same = set(results) == {reference}

    record("kill", f"{victim} {number}", kind="plain", victim=victim, ours="same result" if same else "other result",
           **told)  # fmt: skip
    assert same, read_logs(run)
    assert told["worst_lost_steps"] <= SAVE_STEPS
