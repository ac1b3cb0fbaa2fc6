"""Which checkpoint to continue from: the newest that verifies."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from lora_jobs.checkpoints.aside import set_aside
from lora_jobs.checkpoints.manifest import MANIFEST
from lora_jobs.checkpoints.trust import find_stranger
from lora_jobs.checkpoints.verify import CheckpointVerdict, find_step, verify_checkpoint, verify_foreign
from lora_jobs.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

LOST_MANIFEST = f"it was committed, and has lost its {MANIFEST}"
GONE = "it was committed, and is gone"


class Choice(Struct, frozen=True):
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
    """Newest to oldest, the first that verifies and that nobody else could have written; older ones are not read.

    `accept_unverified` also takes one without a manifest, when its structure and its meaning hold.
    Nothing is changed.
    """
    verdicts = []
    for path in list_checkpoints(directory):
        unverified = accept_unverified and not os.path.lexists(path / MANIFEST)
        verdict = verify_foreign(path) if unverified else verify_checkpoint(path, level=level)
        if verdict.good and (stranger := find_stranger([path, *path.rglob("*")])) is not None:
            verdict = replace(verdict, good=False, reason=stranger)
        verdicts.append(verdict)
        if verdict.good:
            return Choice(path, tuple(verdicts))
    return Choice(None, tuple(verdicts))


def set_failures_aside(choice: Choice, *, known: Collection[int] = ()) -> list[tuple[Path, str]]:
    """Move what was committed and did not verify out of the way: (new place, reason) of each. Never deletes.

    Committed is what has a manifest, and what the run's records know as committed (`known`, by step). Where nothing
    was chosen all stays as it is: the next look must find that there were checkpoints.
    """
    if choice.chosen is None:
        return []
    reasons = [(verdict.path, find_failure(verdict, known)) for verdict in choice.verdicts if not verdict.good]
    return [(set_aside(path, reason), reason) for path, reason in reasons if reason is not None]


def list_failures(choice: Choice, directory: Path, *, known: Collection[int] = ()) -> list[str]:
    """What was committed and can't be continued from, in words, newest first; `known` as in `set_failures_aside`."""
    newest = f"checkpoint-{max(known)}" if known else None
    gone = [f"{newest}: {GONE}"] if newest is not None and not os.path.lexists(directory / newest) else []
    reasons = [(verdict.path.name, find_failure(verdict, known)) for verdict in choice.verdicts if not verdict.good]
    return gone + [f"{name}: {reason}" for name, reason in reasons if reason is not None]


def find_failure(verdict: CheckpointVerdict, known: Collection[int]) -> str | None:
    """Why a committed checkpoint is not good; None for a save that was never finished."""
    if os.path.lexists(verdict.path / MANIFEST):
        return verdict.reason
    return LOST_MANIFEST if verdict.step in known else None
