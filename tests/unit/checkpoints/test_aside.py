"""What is in the way or no good is moved aside with its reason; a link is never followed."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest

from lora_jobs.checkpoints import clear_for_save, discard_unfinished, list_checkpoints, set_aside, verify_checkpoint
from lora_jobs.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Maker = Callable[..., Path]


def test_a_folder_is_moved_with_its_reason_beside_it(tmp_path: Path, commit: Maker) -> None:
    before = time.time()
    first = set_aside(commit(8), "a bit is wrong")
    second = set_aside(commit(8), "another bit is wrong")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-8.set-aside-1",
        "checkpoint-8.set-aside-1.json",
        "checkpoint-8.set-aside-2",
        "checkpoint-8.set-aside-2.json",
    ]
    records = [json.loads(path.with_name(f"{path.name}.json").read_text()) for path in (first, second)]
    assert [record["reason"] for record in records] == ["a bit is wrong", "another bit is wrong"]
    assert [record["moved_from"] for record in records] == ["checkpoint-8"] * 2
    assert before <= records[0]["moved_at"] <= records[1]["moved_at"] <= time.time()
    assert list_checkpoints(tmp_path) == []
    assert verify_checkpoint(second.rename(tmp_path / "checkpoint-8")).good


def test_what_lies_where_a_checkpoint_goes_is_moved_if_committed_and_deleted_if_not(
    tmp_path: Path, commit: Maker, save: Maker
) -> None:
    clear_for_save(commit(4))
    clear_for_save(save(4))
    clear_for_save(tmp_path / "checkpoint-4")
    assert [path.name for path in sorted(tmp_path.iterdir()) if path.is_dir()] == ["checkpoint-4.set-aside-1"]


def test_nothing_is_saved_through_a_link(tmp_path: Path, commit: Maker) -> None:
    elsewhere = commit(4).rename(tmp_path / "elsewhere")
    (tmp_path / "checkpoint-4").symlink_to(elsewhere)
    with pytest.raises(RunError, match="never saved through one"):
        clear_for_save(tmp_path / "checkpoint-4")
    assert (elsewhere / "MANIFEST.json").exists()


def test_what_a_failed_save_left_is_deleted_and_a_committed_one_is_not(
    tmp_path: Path, commit: Maker, save: Maker
) -> None:
    committed = commit(4)
    discard_unfinished(save(8))
    discard_unfinished(committed)
    discard_unfinished(tmp_path / "checkpoint-12")
    assert list_checkpoints(tmp_path) == [committed]
