"""Which checkpoints are kept. By step, after the commit; the last two good ones are never removed."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from lora_jobs.checkpoints.choose import list_checkpoints
from lora_jobs.checkpoints.manifest import MANIFEST
from lora_jobs.checkpoints.verify import find_step, verify_checkpoint
from lora_jobs.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

FEWEST_KEPT = 2
ADAPTER = "adapter"


def rotate_checkpoints(
    directory: Path, *, keep: int = 2, protect: Collection[Path] = (), level: int = 0
) -> tuple[Path, ...]:
    """Remove what is not needed any more; returns what was removed, newest first.

    Kept: the newest `keep` (at least two) that verify at `level`, all of `protect`, and damaged ones among them.
    Removed: what is older than those, and unfinished saves that are older than the newest good one.
    """
    doomed = _choose_doomed(directory, keep=max(keep, FEWEST_KEPT), protect=protect, level=level)
    for path in doomed:
        _remove(path)
    return tuple(doomed)


def discard_partial(directory: Path) -> None:
    """Clear what is left of an earlier save of this step (or of the adapter), before a new one into the same folder.

    One that verifies is not cleared: CheckpointError, since training can continue from it.
    """
    if not os.path.lexists(directory):
        return
    if directory.is_symlink() or not directory.is_dir():
        raise CheckpointError(f"{directory} is in the way of a checkpoint: not a directory", path=directory)
    if verify_checkpoint(directory).good:
        raise CheckpointError(f"{directory} is a good checkpoint already; it is not overwritten", path=directory)
    _remove(directory)


def _choose_doomed(directory: Path, *, keep: int, protect: Collection[Path], level: int) -> list[Path]:
    spared = {path.absolute() for path in protect}
    good = 0
    doomed = []
    for path in list_checkpoints(directory):
        if path.is_symlink() or not path.is_dir():
            continue
        enough = good >= keep
        unfinished = not os.path.lexists(path / MANIFEST)
        if (enough or (unfinished and good)) and path.absolute() not in spared:
            doomed.append(path)
        elif not enough:
            good += verify_checkpoint(path, level=level).good
    return doomed


def _remove(path: Path) -> None:
    """The manifest first: a removal that is cut short leaves an unfinished folder, not a damaged checkpoint."""
    if find_step(path) is None and path.name != ADAPTER:
        raise CheckpointError(f"{path} is neither a checkpoint's folder nor an adapter's", path=path)
    try:
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)
    except OSError as error:
        raise CheckpointError(f"{path} can't be removed: {error.strerror}", path=path) from error
