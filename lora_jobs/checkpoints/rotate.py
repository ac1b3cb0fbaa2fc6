"""Which checkpoints are kept. By step, after the commit; the last two good ones are never removed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from msgspec import Struct

from lora_jobs.checkpoints.aside import remove, set_aside
from lora_jobs.checkpoints.choose import find_failure, list_checkpoints
from lora_jobs.checkpoints.manifest import MANIFEST, PINNED
from lora_jobs.checkpoints.verify import verify_checkpoint
from lora_jobs.runs import FEWEST_KEPT

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path


class Rotation(Struct, frozen=True):
    """What a rotation did, newest first: folders that were removed, and damaged ones with their new places."""

    removed: tuple[Path, ...]
    set_aside: tuple[Path, ...]


def rotate_checkpoints(
    directory: Path,
    *,
    keep: int = 2,
    protect: Collection[Path] = (),
    committed: Path | None = None,
    known: Collection[int] = (),
    level: int = 2,
) -> Rotation:
    """Remove what is not needed any more, and move what is damaged aside, with the reason beside it.

    Kept: the newest `keep` (at least two) that verify at `level`, all of `protect`, those with a file named PINNED in
    them, and whatever lies among them. `committed` was hashed just now: its sizes are enough. Removed: what is older
    and whole by its sizes, and unfinished saves that are older than the newest good one; what is `known` to have been
    committed is no unfinished save.
    """
    spared = {path.absolute() for path in protect}
    good = 0
    removed, moved = [], []
    for path in list_checkpoints(directory):
        if path.is_symlink() or not path.is_dir():
            continue
        unfinished = not os.path.lexists(path / MANIFEST)
        if good < max(keep, FEWEST_KEPT) and not (unfinished and good):
            good += verify_checkpoint(path, level=0 if path == committed else level).good
        elif path.absolute() in spared or os.path.lexists(path / PINNED):
            continue
        elif not (verdict := verify_checkpoint(path, level=0)).good and (reason := find_failure(verdict, known)):
            moved.append(set_aside(path, reason))
        else:
            remove(path)
            removed.append(path)
    return Rotation(tuple(removed), tuple(moved))
