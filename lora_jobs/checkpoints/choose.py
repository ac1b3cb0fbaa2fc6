"""Which checkpoint to continue from: the newest that verifies."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_jobs.checkpoints.aside import set_aside
from lora_jobs.checkpoints.manifest import MANIFEST
from lora_jobs.checkpoints.verify import CheckpointVerdict, find_step, verify_checkpoint, verify_foreign
from lora_jobs.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Choice:
    """The checkpoint to continue from (None: none is good), and the verdicts that led there, newest first."""

    chosen: Path | None
    verdicts: tuple[CheckpointVerdict, ...]


def list_checkpoints(directory: Path) -> list[Path]:
    """Everything named checkpoint-N in `directory`, highest N first; committed or not, good or not."""
    try:
        found = [(step, path) for path in directory.iterdir() if (step := find_step(path)) is not None]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{directory} can't be read: {error.strerror}", path=directory) from error
    return [path for _, path in sorted(found, reverse=True)]


def choose_checkpoint(directory: Path, *, level: int = 2, accept_unverified: bool = False) -> Choice:
    """Newest to oldest, the first that verifies; older ones are not read. Nothing is changed.

    `accept_unverified` also takes one without a manifest, when its structure and its meaning hold.
    """
    verdicts = []
    for path in list_checkpoints(directory):
        unverified = accept_unverified and not os.path.lexists(path / MANIFEST)
        verdict = verify_foreign(path) if unverified else verify_checkpoint(path, level=level)
        verdicts.append(verdict)
        if verdict.good:
            return Choice(path, tuple(verdicts))
    return Choice(None, tuple(verdicts))


def set_failures_aside(choice: Choice) -> list[tuple[Path, str]]:
    """Move what was committed and did not verify out of the way: (new place, reason) of each. Never deletes.

    Where nothing was chosen all stays as it is: the next look must find that there were checkpoints.
    """
    if choice.chosen is None:
        return []
    failed = [verdict for verdict in choice.verdicts if not verdict.good and os.path.lexists(verdict.path / MANIFEST)]
    return [(set_aside(verdict.path, verdict.reason), verdict.reason) for verdict in failed]
