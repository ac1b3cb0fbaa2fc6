"""Signals at every kind of moment: all ranks save the same step together, nothing is lost, the resume is exact."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from fault_ranks import KINDS, fault
from interruptions import finish, interrupt, wait_until_begun
from tiny_runs import Job, RankServer, create_tiny_run, wait_for_step

from lora_jobs.checkpoints import list_checkpoints, verify_checkpoint
from lora_jobs.runs import load_attempts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lora_jobs.runs import Run

pytestmark = pytest.mark.train

LONG = os.environ.get("LORA_JOBS_FAULTS") == "long"
TERM, USR2 = "SIGTERM", "SIGUSR2"


@dataclass(frozen=True)
class Signalled:
    """One case: signals that the ranks send themselves at exact places, or that come from outside."""

    name: str
    faults: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    outside: Callable[[Run, Job], None] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    kind: str = "zero2"
    short: bool = False


def staggered(seconds: float) -> Callable[[Run, Job], None]:
    """The second rank is told later; by then both may have saved and gone."""

    def send(run: Run, job: Job) -> None:
        wait_for_step(run, 3)
        job.kill(signal.SIGTERM, ranks=[0])
        time.sleep(seconds)
        pid = job.pids[1]
        job_code = job.server.ask({"poll": pid})["code"]
        if job_code is None:
            job.kill(signal.SIGTERM, ranks=[1])
        else:
            job.codes[pid] = job_code

    return send


def at_set_up(_run: Run, job: Job) -> None:
    """As soon as the attempt is on record: libraries, model and process group are still to come."""
    wait_until_begun(_run)
    job.kill(signal.SIGTERM)


def to_whole_sessions(run: Run, job: Job) -> None:
    """As Slurm does: every process of the step, the data loaders' workers among them."""
    wait_for_step(run, 3)
    for pid in job.pids:
        os.killpg(pid, signal.SIGTERM)


LONGER = {"max_steps": 40, "save_steps": 10}
EVALUATED = {"eval_steps": 2, "per_device_eval_batch_size": 1}
CASES = (
    Signalled("SIGTERM to both ranks", {rank: [fault("on_step_begin", 3, TERM)] for rank in (0, 1)}),
    Signalled("SIGUSR2 to both ranks", {rank: [fault("on_step_begin", 3, USR2)] for rank in (0, 1)}),
    Signalled("SIGTERM to rank 0 only", {0: [fault("on_step_begin", 3, TERM)]}),
    Signalled("SIGUSR2 to rank 1 only", {1: [fault("on_step_end", 3, USR2)]}),
    Signalled("at both ends of a step", {0: [fault("on_step_begin", 3, TERM)], 1: [fault("on_step_end", 4, TERM)]}),
    Signalled("twice, SIGTERM and SIGUSR2", {0: [fault("on_step_begin", 3, TERM), fault("on_save", 4, USR2)]}),
    Signalled("during an evaluation", {1: [fault("on_prediction_step", 4, TERM, 2)]}, training=EVALUATED, short=True),
    Signalled("at the end of an evaluation", {0: [fault("on_evaluate", 4, TERM)]}, training=EVALUATED),
    Signalled("during a save", {0: [fault("on_save", 4, TERM)]}, short=True),
    Signalled("during a save, other rank", {1: [fault("on_save", 4, USR2)]}),
    Signalled("during set-up", outside=at_set_up),
    *(Signalled(f"{seconds} s apart", outside=staggered(seconds), training=LONGER) for seconds in (0.1, 0.5, 1, 2, 5)),
    Signalled(
        "with data loader workers, to every process",
        outside=to_whole_sessions,
        training={**LONGER, "dataloader_num_workers": 2},
    ),
)  # fmt: skip


@pytest.mark.parametrize("case", [case for case in CASES if LONG or case.short], ids=lambda case: case.name)
def test_a_signal_loses_no_step(
    case: Signalled,
    server: RankServer,
    tiny: Path,
    tmp_path: Path,
    uninterrupted: Callable[..., str],
    record: Callable[..., None],
) -> None:
    sections, ranks = KINDS[case.kind]
    sections = {**sections, "training": {**sections["training"], **case.training}}
    if "eval_steps" in case.training:
        del sections["data"]
    run = create_tiny_run(tmp_path, "signalled-1", tiny, **sections)
    outside = case.outside
    meanwhile = None if outside is None else lambda job: outside(run, job)
    ended = interrupt(server, run, ranks, faults=case.faults, meanwhile=meanwhile)
    newest = next(iter(list_checkpoints(run.checkpoints)), None)
    good = newest is None or verify_checkpoint(newest).good
    reason = load_attempts(run)[0].reason
    same = finish(server, run, ranks) == uninterrupted(sections, ranks)
    told = {"lost_steps": ended.lost_steps, "hung": ended.hung, "codes": ended.codes}
    record("signal", case.name, ours="saved, same result" if ended.saved and same else "not saved", **told)
    assert ended.saved, (ended, reason)
    assert (ended.lost_steps, good, same) == (0, True, True)


EVERY: dict[str, Any] = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 10}
PLACES = ("on_step_begin", "on_substep_end", "on_step_end")


@pytest.mark.parametrize("place", PLACES if LONG else PLACES[1:2])
@pytest.mark.parametrize("kind", ["plain", "zero2"] if LONG else ["plain"])
def test_interrupted_in_every_step(
    kind: str,
    place: str,
    server: RankServer,
    tiny: Path,
    tmp_path: Path,
    uninterrupted: Callable[..., str],
    record: Callable[..., None],
) -> None:
    """Ten steps, ten interruptions, two and a half epochs: at a step's begin, between its halves, at its end."""
    sections, ranks = KINDS[kind]
    steps = 10 if LONG else 5
    training = {**sections["training"], **EVERY, "max_steps": steps}
    if kind == "zero2":
        training["per_device_train_batch_size"] = 4
    sections = {**sections, "training": training}
    run = create_tiny_run(tmp_path, "often-1", tiny, **sections)
    at = range(1, steps) if place == "on_step_end" else range(steps - 1)
    for step in at:
        ended = interrupt(server, run, ranks, faults={0: [fault(place, step, TERM)]})
        assert ended.saved, (step, ended, load_attempts(run)[-1].reason)
        assert ended.lost_steps == 0
    same = finish(server, run, ranks) == uninterrupted(sections, ranks)
    told = {"interruptions": len(load_attempts(run)) - 1, "lost_steps": 0, "hung": False}
    record("every step", f"{place}, {kind}", ours="same result" if same else "other result", **told)
    assert len(load_attempts(run)) == steps
    assert same
