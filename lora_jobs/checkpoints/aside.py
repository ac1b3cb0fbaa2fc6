"""What must not be used is moved aside with the reason beside it, never deleted; what was never finished may go."""

from __future__ import annotations

import json
import os
import shutil
import time
from typing import TYPE_CHECKING

from lora_jobs.checkpoints.manifest import MANIFEST
from lora_jobs.checkpoints.verify import find_step, verify_checkpoint
from lora_jobs.errors import CheckpointError, RunError
from lora_jobs.runs.durable import write_atomic

if TYPE_CHECKING:
    from pathlib import Path

ADAPTER = "adapter"


def set_aside(directory: Path, reason: str) -> Path:
    """Move a folder to NAME.set-aside-K, with NAME.set-aside-K.json saying why and when. Returns the new place.

    The reason is on the disk before the folder moves. CheckpointError when it can't be moved.
    """
    number = 1
    while (aside := directory.with_name(f"{directory.name}.set-aside-{number}")).exists():
        number += 1
    record = {"moved_from": directory.name, "moved_at": time.time(), "reason": reason}
    write_atomic(aside.with_name(f"{aside.name}.json"), json.dumps(record, indent=2) + "\n")
    try:
        directory.rename(aside)
    except OSError as error:
        raise CheckpointError(f"{directory} can't be moved aside: {error.strerror}", path=directory) from error
    return aside


def clear_for_save(directory: Path) -> None:
    """Clear what lies where this step's checkpoint would go: an unfinished save is deleted.

    A committed one is set aside (a good one cannot be there, since training starts after the newest good one).
    """
    if directory.is_symlink():
        raise RunError(f"{directory} is a link: a checkpoint is never saved through one", hint="move the link away")
    if os.path.lexists(directory / MANIFEST):
        set_aside(directory, "training passed this step again: it was not chosen to continue from")
    elif directory.exists():
        discard_partial(directory)


def discard_unfinished(directory: Path) -> None:
    """Delete what a failed save has left, to give its room back. One with a manifest stays."""
    if directory.is_dir() and not directory.is_symlink() and not os.path.lexists(directory / MANIFEST):
        discard_partial(directory)


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
    remove(directory)


def remove(path: Path) -> None:
    """The manifest first: a removal that is cut short leaves an unfinished folder, not a damaged checkpoint."""
    if find_step(path) is None and path.name != ADAPTER:
        raise CheckpointError(f"{path} is neither a checkpoint's folder nor an adapter's", path=path)
    try:
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)
    except OSError as error:
        raise CheckpointError(f"{path} can't be removed: {error.strerror}", path=path) from error
