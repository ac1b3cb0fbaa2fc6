"""Files that others could have changed: not loaded."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from lora_jobs.checkpoints import choose_checkpoint, require_own
from lora_jobs.checkpoints.trust import find_stranger
from lora_jobs.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Maker = Callable[..., Path]


def test_ones_own_closed_files_are_fine(tmp_path: Path) -> None:
    for number, mode in enumerate((0o600, 0o644, 0o664, 0o444)):
        path = tmp_path / f"{number}"
        path.write_text("")
        path.chmod(mode)
    assert find_stranger(tmp_path.iterdir()) is None
    require_own(tmp_path, tmp_path / "absent")


def test_what_everyone_can_write_is_named_with_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o707)
    with pytest.raises(RunError, match=r"can be written by everyone \(mode 0707\): what is in it is not loaded"):
        require_own(tmp_path)


def test_a_link_that_leads_out_of_the_run_is_not_followed(tmp_path: Path, commit: Maker) -> None:
    commit(4)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path)
    with pytest.raises(RunError, match="checkpoints is a link: what is in it is not loaded"):
        require_own(tmp_path / "run", tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize("name", ["", "global_step8", "optimizer.pt"])
def test_a_checkpoint_that_others_can_change_is_passed_over(name: str, tmp_path: Path, commit: Maker) -> None:
    older, newer = commit(4), commit(8)
    (newer / "global_step8").mkdir()
    (newer / name).chmod(0o777)
    choice = choose_checkpoint(tmp_path)
    assert choice.chosen == older
    assert "can be written by everyone (mode 0777)" in choice.verdicts[0].reason


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_another_users_file_is_named_with_its_owner(tmp_path: Path, commit: Maker) -> None:
    directory = commit(4)
    os.chown(directory / "optimizer.pt", 65534, 65534)
    choice = choose_checkpoint(tmp_path)
    assert choice.chosen is None
    assert choice.verdicts[0].reason == f"{directory}/optimizer.pt belongs to another user (uid 65534)"
