"""Which checkpoint is continued from, which are kept, which go."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from lora_jobs.checkpoints import (
    PINNED,
    Choice,
    Rotation,
    choose_checkpoint,
    discard_partial,
    list_checkpoints,
    rotate_checkpoints,
    set_failures_aside,
    verify_checkpoint,
)
from lora_jobs.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Maker = Callable[..., Path]


def _names(paths: list[Path] | tuple[Path, ...]) -> list[str]:
    return [path.name for path in paths]


def _left(directory: Path) -> list[str]:
    return _names(list_checkpoints(directory))


def _damage(checkpoint: Path) -> None:
    os.truncate(checkpoint / "optimizer.pt", 10)


def _rot(checkpoint: Path) -> None:
    """A change that only the hashes show."""
    (checkpoint / "README.md").write_text("an adapter.\n")


def test_checkpoints_are_listed_by_number_newest_first(tmp_path: Path) -> None:
    for name in (
        "checkpoint-9",
        "checkpoint-100",
        "checkpoint-20",
        "checkpoint-",
        "checkpoint-x",
        "best",
        "checkpoint-1a",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-3").write_text("")
    assert _left(tmp_path) == ["checkpoint-100", "checkpoint-20", "checkpoint-9", "checkpoint-3"]
    assert list_checkpoints(tmp_path / "absent") == []


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="can't be read: Not a directory"):
        list_checkpoints(tmp_path / "file")


def test_the_newest_good_one_is_chosen_and_older_ones_are_not_read(tmp_path: Path, commit: Maker) -> None:
    commit(10), commit(9)
    newest = commit(100)
    choice = choose_checkpoint(tmp_path)
    assert choice == Choice(newest, (verify_checkpoint(newest),))


def test_damaged_and_unfinished_ones_are_passed_over_with_their_reasons(
    tmp_path: Path, commit: Maker, save: Maker
) -> None:
    commit(10)
    good, rotten, damaged, unfinished = commit(20), commit(30), commit(40), save(50)
    _rot(rotten)
    _damage(damaged)
    choice = choose_checkpoint(tmp_path)
    assert choice.chosen == good
    assert choice.verdicts == tuple(verify_checkpoint(path) for path in (unfinished, damaged, rotten, good))
    assert [verdict.good for verdict in choice.verdicts] == [False, False, False, True]
    assert choose_checkpoint(tmp_path, level=0).chosen == rotten


def test_none_is_chosen_where_none_is_good(tmp_path: Path, commit: Maker) -> None:
    assert choose_checkpoint(tmp_path / "absent") == Choice(None, ())
    _damage(commit(10))
    choice = choose_checkpoint(tmp_path)
    assert (choice.chosen, len(choice.verdicts)) == (None, 1)


def test_rotation_keeps_the_newest_by_number_whatever_their_dates(tmp_path: Path, commit: Maker) -> None:
    for step in (9, 100, 20, 10):
        commit(step)
    os.utime(tmp_path / "checkpoint-9")
    assert _names(rotate_checkpoints(tmp_path, keep=2).removed) == ["checkpoint-10", "checkpoint-9"]
    assert _left(tmp_path) == ["checkpoint-100", "checkpoint-20"]
    assert all(verify_checkpoint(path).good for path in list_checkpoints(tmp_path))


@pytest.mark.parametrize("keep", [-1, 0, 1, 2])
def test_rotation_never_keeps_fewer_than_two(tmp_path: Path, commit: Maker, keep: int) -> None:
    for step in (1, 2, 3):
        commit(step)
    assert _names(rotate_checkpoints(tmp_path, keep=keep).removed) == ["checkpoint-1"]
    assert rotate_checkpoints(tmp_path, keep=keep) == Rotation((), ())


def test_only_good_ones_count_as_kept(tmp_path: Path, commit: Maker, save: Maker) -> None:
    """With the three newest broken, the two good ones before them are the last two."""
    for step in (1, 2, 3):
        commit(step)
    _damage(commit(4))
    _damage(commit(5))
    save(6)
    assert _names(rotate_checkpoints(tmp_path).removed) == ["checkpoint-1"]
    assert _left(tmp_path) == ["checkpoint-6", "checkpoint-5", "checkpoint-4", "checkpoint-3", "checkpoint-2"]


def test_a_rotten_one_counts_at_level_0_and_not_at_level_2(tmp_path: Path, commit: Maker) -> None:
    for step in (1, 2, 3):
        commit(step)
    _rot(tmp_path / "checkpoint-3")
    assert rotate_checkpoints(tmp_path, level=2) == Rotation((), ())
    assert _names(rotate_checkpoints(tmp_path, level=0).removed) == ["checkpoint-1"]


def test_only_the_one_committed_just_now_is_not_read_again(tmp_path: Path, commit: Maker) -> None:
    for step in (1, 2, 3):
        commit(step)
    _rot(tmp_path / "checkpoint-3")
    assert rotate_checkpoints(tmp_path) == Rotation((), ())
    committed = tmp_path / "checkpoint-3"
    assert _names(rotate_checkpoints(tmp_path, committed=committed).removed) == ["checkpoint-1"]


def test_a_damaged_one_that_would_go_is_moved_aside_with_the_reason(tmp_path: Path, commit: Maker) -> None:
    for step in (1, 2, 3, 4):
        commit(step)
    _damage(tmp_path / "checkpoint-1")
    done = rotate_checkpoints(tmp_path)
    assert (_names(done.removed), _names(done.set_aside)) == (["checkpoint-2"], ["checkpoint-1.set-aside-1"])
    record = json.loads((tmp_path / "checkpoint-1.set-aside-1.json").read_text())
    assert record["reason"].startswith("optimizer.pt is 10 bytes, ")
    assert (tmp_path / "checkpoint-1.set-aside-1" / "optimizer.pt").exists()


def test_one_that_lost_its_manifest_is_moved_aside_where_an_unfinished_save_goes(
    tmp_path: Path, commit: Maker, save: Maker
) -> None:
    for step in (3, 4):
        commit(step)
    save(1), save(2)
    done = rotate_checkpoints(tmp_path, known={2, 3, 4})
    assert (_names(done.removed), _names(done.set_aside)) == (["checkpoint-1"], ["checkpoint-2.set-aside-1"])
    record = json.loads((tmp_path / "checkpoint-2.set-aside-1.json").read_text())
    assert record["reason"] == "it was committed, and has lost its MANIFEST.json"
    assert (tmp_path / "checkpoint-2.set-aside-1" / "optimizer.pt").exists()


def test_a_pinned_one_stays_and_is_as_good_as_before(tmp_path: Path, commit: Maker) -> None:
    for step in (1, 2, 3, 4):
        commit(step)
    (tmp_path / "checkpoint-1" / PINNED).touch()
    assert _names(rotate_checkpoints(tmp_path).removed) == ["checkpoint-2"]
    assert verify_checkpoint(tmp_path / "checkpoint-1").good


def test_what_failed_is_moved_aside_when_an_older_one_is_chosen(tmp_path: Path, commit: Maker, save: Maker) -> None:
    good, damaged, unfinished = commit(10), commit(20), save(30)
    _damage(damaged)
    choice = choose_checkpoint(tmp_path)
    ((place, reason),) = set_failures_aside(choice)
    assert (place.name, reason) == ("checkpoint-20.set-aside-1", choice.verdicts[1].reason)
    assert list_checkpoints(tmp_path) == [unfinished, good]
    assert set_failures_aside(choose_checkpoint(tmp_path)) == []


def test_where_none_is_good_all_stays_to_be_seen(tmp_path: Path, commit: Maker) -> None:
    _damage(commit(10))
    assert set_failures_aside(choose_checkpoint(tmp_path)) == []
    assert _left(tmp_path) == ["checkpoint-10"]


def test_one_good_checkpoint_is_never_removed(tmp_path: Path, commit: Maker) -> None:
    commit(1)
    for step in (2, 3, 4):
        _damage(commit(step))
    assert rotate_checkpoints(tmp_path, keep=1) == Rotation((), ())


def test_protected_ones_stay(tmp_path: Path, commit: Maker) -> None:
    for step in (1, 2, 3, 4):
        commit(step)
    best = tmp_path / "checkpoint-1"
    assert _names(rotate_checkpoints(tmp_path, protect={best}).removed) == ["checkpoint-2"]
    assert verify_checkpoint(best).good


def test_unfinished_saves_go_when_a_newer_one_is_committed(tmp_path: Path, commit: Maker, save: Maker) -> None:
    save(1), commit(2), save(3), commit(4), save(5)
    assert _names(rotate_checkpoints(tmp_path).removed) == ["checkpoint-3", "checkpoint-1"]
    assert _left(tmp_path) == ["checkpoint-5", "checkpoint-4", "checkpoint-2"]


def test_unfinished_saves_stay_while_nothing_is_committed(tmp_path: Path, save: Maker) -> None:
    save(1), save(2)
    assert rotate_checkpoints(tmp_path) == Rotation((), ())


def test_rotation_follows_no_link(tmp_path: Path, commit: Maker) -> None:
    elsewhere = commit(1).rename(tmp_path / "kept")
    for step in (2, 3):
        commit(step)
    (tmp_path / "checkpoint-1").symlink_to(elsewhere)
    (tmp_path / "checkpoint-0").write_text("a file")
    assert rotate_checkpoints(tmp_path) == Rotation((), ())
    assert (elsewhere / "optimizer.pt").exists()


def test_the_rest_of_a_broken_save_is_cleared(tmp_path: Path, commit: Maker, save: Maker) -> None:
    discard_partial(tmp_path / "checkpoint-1")
    discard_partial(save(2))
    damaged = commit(3)
    _damage(damaged)
    discard_partial(damaged)
    discard_partial(save(4).rename(tmp_path / "adapter"))
    assert list(tmp_path.iterdir()) == []


def test_a_good_checkpoint_is_not_cleared(tmp_path: Path, commit: Maker) -> None:
    good = commit(1)
    with pytest.raises(CheckpointError, match="is a good checkpoint already"):
        discard_partial(good)
    assert verify_checkpoint(good).good


def test_nothing_but_a_checkpoint_folder_is_cleared(tmp_path: Path, save: Maker) -> None:
    other = save(1).rename(tmp_path / "precious")
    (tmp_path / "checkpoint-1").symlink_to(other)
    (tmp_path / "checkpoint-2").write_text("a file")
    for path, reason in (
        (other, "is neither a checkpoint's folder nor an adapter's"),
        (tmp_path / "checkpoint-1", "is in the way of a checkpoint"),
        (tmp_path / "checkpoint-2", "is in the way of a checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            discard_partial(path)
    assert (other / "optimizer.pt").exists()
