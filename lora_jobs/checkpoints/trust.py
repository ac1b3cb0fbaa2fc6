"""Whose files are these? A resume loads what is in a run's directory: it has to be the user's own, and closed."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from lora_jobs.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


def find_stranger(paths: Iterable[Path]) -> str | None:
    """Why somebody else could have changed one of these; None where nobody could. No link is followed, or accepted."""
    for path in paths:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            return f"{path} is a link"
        if status.st_uid != os.geteuid():
            return f"{path} belongs to another user (uid {status.st_uid})"
        if status.st_mode & stat.S_IWOTH:
            return f"{path} can be written by everyone (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def require_own(*directories: Path) -> None:
    """RunError when one of these directories is a link, another user's, or open to everyone."""
    if (reason := find_stranger(path for path in directories if os.path.lexists(path))) is not None:
        raise RunError(
            f"{reason}: what is in it is not loaded",
            hint="if it is yours: chmod -R o-w on the run; if not: copy its spec.yaml and submit a run of your own",
        )
