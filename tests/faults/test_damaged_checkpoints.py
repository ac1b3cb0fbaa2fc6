"""Each damage to the newest checkpoint of a stopped run: what stock resume does, and what ours does."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from damage import COMMITTED, DAMAGES, NOTHING, OPEN, Damage, Scene, damage
from fault_ranks import Outcome, Stopped, copy_run, copy_stock, resume_ours, resume_stock

from lora_jobs.checkpoints import choose_checkpoint, list_checkpoints
from lora_jobs.errors import LoraJobsError
from lora_jobs.training.attempt import choose_start

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tiny_runs import RankServer

    from lora_jobs.runs import Run

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]

LONG = os.environ.get("LORA_JOBS_FAULTS") == "long"
CASES = [
    (case, kind, committed)
    for rows, committed in ((DAMAGES, False), (OPEN, False), (COMMITTED, True))
    for case in rows
    for kind in case.kinds
]
# Trained in the short form: one of each way that stock goes wrong.
TRAINED = {
    ("one bit flipped in an optimizer shard", "zero2"),
    ("rng_state.pth is missing", "plain"),
    ("code hidden in an optimizer shard", "zero2"),
}


def name_case(values: tuple[Damage, str, bool]) -> str:
    return f"{values[0].name}, {values[1]}"


def build_scene(stopped: Stopped, run: Run, marker: Path) -> Scene:
    newest, older = run.checkpoints / "checkpoint-4", run.checkpoints / "checkpoint-2"
    return Scene(newest, older, stopped.other.checkpoints / "checkpoint-4", marker)


def damage_ours(stopped: Stopped, case: Damage, committed: bool, directory: Path, marker: Path) -> Run:
    run = copy_run(stopped.run, directory)
    damage(case, build_scene(stopped, run, marker), committed=committed)
    return run


@pytest.mark.parametrize("values", CASES, ids=name_case)
def test_nothing_is_trained_from_a_damaged_checkpoint(
    values: tuple[Damage, str, bool], stopped: Callable[[str], Stopped], tmp_path: Path
) -> None:
    """Without training: which checkpoint the batch script would choose."""
    case, kind, committed = values
    if case.needs_root and os.geteuid() != 0:
        pytest.skip("only root can give files away")
    found = stopped(kind)
    marker = tmp_path / "executed"
    run = damage_ours(found, case, committed, tmp_path / "run", marker)
    if committed:
        choice = choose_checkpoint(run.checkpoints, level=3)
        chosen, why = choice.chosen, [verdict.reason for verdict in choice.verdicts]
    else:
        start = choose_start(run, world_size=found.ranks)
        chosen, why = start.checkpoint, list(start.explanation)
    assert chosen is not None, why
    assert chosen.name == "checkpoint-2", why
    assert not marker.exists()


@pytest.mark.parametrize("values", [v for v in CASES if LONG or (v[0].name, v[1]) in TRAINED], ids=name_case)
def test_stock_and_ours_side_by_side(
    values: tuple[Damage, str, bool],
    stopped: Callable[[str], Stopped],
    server: RankServer,
    tmp_path: Path,
    record: Callable[..., None],
) -> None:
    case, kind, committed = values
    if case.needs_root and os.geteuid() != 0:
        pytest.skip("only root can give files away")
    found = stopped(kind)
    marker = tmp_path / "executed"
    run = damage_ours(found, case, committed, tmp_path / "run", marker)
    ours = resume_ours(server, run, found.ranks, older="checkpoint-2", reference=found.reference)
    if marker.exists():
        ours = Outcome(f"{ours.verdict}; ran the hidden code", ours.detail)
    stock = Outcome("not applicable", "stock has no manifest")
    if not case.ours_only and not committed:
        marker = tmp_path / "executed_by_stock"
        job = copy_stock(found.stock, tmp_path / "stock")
        directory = tmp_path / "stock"
        damage(
            case,
            Scene(directory / "checkpoint-4", directory / "checkpoint-2", find_foreign(found), marker),
            committed=False,
        )
        stock = resume_stock(server, job, found.ranks, reference=found.stock_reference, marker=marker)
    record(
        "damage", case.name, kind=kind, stock=stock.verdict, stock_detail=stock.detail, ours=ours.verdict,
        ours_detail=ours.detail, good_one_exists=True,
    )  # fmt: skip
    assert ours.verdict in case.expected, ours


def find_foreign(found: Stopped) -> Path:
    """Another run's checkpoint of the same step: the tensors have the same names and shapes in ours and in stock."""
    return found.other.checkpoints / "checkpoint-4"


@pytest.mark.parametrize("kind", ["plain", "zero2"] if LONG else ["zero2"])
def test_without_damage_both_resume_exactly(
    kind: str, stopped: Callable[[str], Stopped], server: RankServer, tmp_path: Path, record: Callable[..., None]
) -> None:
    """The control: what the other rows find wrong is the damage's doing."""
    found = stopped(kind)
    run = copy_run(found.run, tmp_path / "run")
    ours = resume_ours(server, run, found.ranks, older="checkpoint-2", reference=found.reference)
    job = copy_stock(found.stock, tmp_path / "stock")
    stock = resume_stock(server, job, found.ranks, reference=found.stock_reference)
    record("control", NOTHING.name, kind=kind, stock=stock.verdict, ours=ours.verdict)
    assert (ours.verdict, ours.detail) == ("accepted, same result", "resumed from checkpoint-4")
    assert (stock.verdict, stock.detail) == ("accepted, same result", "resumed from checkpoint-4")


@pytest.mark.parametrize("kind", ["plain", "zero2"] if LONG else ["zero2"])
def test_when_every_checkpoint_is_damaged_nothing_is_trained(
    kind: str, stopped: Callable[[str], Stopped], server: RankServer, tmp_path: Path, record: Callable[..., None]
) -> None:
    found = stopped(kind)
    run = copy_run(found.run, tmp_path / "run")
    for checkpoint in list_checkpoints(run.checkpoints):
        os.truncate(checkpoint / "trainer_state.json", 10)
    with pytest.raises(LoraJobsError, match="no good checkpoint"):
        choose_start(run, world_size=found.ranks)
    ours = resume_ours(server, run, found.ranks, older="checkpoint-2", reference=found.reference)
    job = copy_stock(found.stock, tmp_path / "stock")
    for checkpoint in list_checkpoints(tmp_path / "stock"):
        os.truncate(checkpoint / "trainer_state.json", 10)
    stock = resume_stock(server, job, found.ranks, reference=found.stock_reference)
    record("damage", "every checkpoint is damaged", kind=kind, stock=stock.verdict, stock_detail=stock.detail,
           ours=ours.verdict, ours_detail=ours.detail, good_one_exists=False)  # fmt: skip
    assert ours.verdict == "refused", ours


@pytest.mark.skipif(not LONG, reason="part of the long form: make faults")
@pytest.mark.parametrize("kind", ["plain", "zero2"])
def test_a_folder_that_everyone_can_write_is_not_resumed_from(
    kind: str, stopped: Callable[[str], Stopped], server: RankServer, tmp_path: Path, record: Callable[..., None]
) -> None:
    """Its checkpoints are whole, and anybody could have put them there."""
    found = stopped(kind)
    run = copy_run(found.run, tmp_path / "run")
    run.checkpoints.chmod(0o777)
    ours = resume_ours(server, run, found.ranks, older="checkpoint-2", reference=found.reference)
    job = copy_stock(found.stock, tmp_path / "stock")
    (tmp_path / "stock").chmod(0o777)
    stock = resume_stock(server, job, found.ranks, reference=found.stock_reference)
    record("damage", "checkpoints/ can be written by everyone", kind=kind, stock=stock.verdict,
           stock_detail=stock.detail, ours=ours.verdict, ours_detail=ours.detail, good_one_exists=False)  # fmt: skip
    assert ours.verdict == "refused", ours
    run.checkpoints.chmod(0o700)
    ours = resume_ours(server, run, found.ranks, older="checkpoint-2", reference=found.reference)
    assert (ours.verdict, ours.detail) == ("accepted, same result", "resumed from checkpoint-4")
