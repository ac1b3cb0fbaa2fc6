"""Is there room for the next checkpoint? Asked before a save, since one that runs into a full disk takes minutes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lora_jobs.checkpoints.choose import list_checkpoints
from lora_jobs.checkpoints.manifest import load_manifest
from lora_jobs.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

# A checkpoint grows a little over a run (its log history), and other files of the run need room too.
GROWTH = 1.05
RESERVE_BYTES = 16 * 1024**2


def find_shortage(directory: Path, *, estimated_bytes: int = 0) -> str | None:
    """Why the next checkpoint does not fit below `directory`; None where it does, or where nobody knows its size.

    Its size is that of the newest committed one, before the first one the estimate. Free is what statvfs grants to
    this user; a quota counts only on file systems that show it there.
    """
    expected = find_committed_bytes(directory) or estimated_bytes
    needed = int(expected * GROWTH) + RESERVE_BYTES
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    if expected == 0 or free >= needed:
        return None
    return f"{directory} has {free:,} bytes free, the next checkpoint needs {needed:,}"


def find_committed_bytes(directory: Path) -> int:
    """Bytes of the newest checkpoint with a manifest; 0 where there is none."""
    for path in list_checkpoints(directory):
        try:
            return load_manifest(path).total_bytes
        except CheckpointError:
            continue
    return 0
