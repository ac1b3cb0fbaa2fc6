"""Which checkpoint to continue from: the newest that verifies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_jobs.checkpoints.verify import CheckpointVerdict, find_step, verify_checkpoint
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


def choose_checkpoint(directory: Path, *, level: int = 2) -> Choice:
    """Newest to oldest, the first that verifies; older ones are not read."""
    verdicts = []
    for path in list_checkpoints(directory):
        verdict = verify_checkpoint(path, level=level)
        verdicts.append(verdict)
        if verdict.good:
            return Choice(path, tuple(verdicts))
    return Choice(None, tuple(verdicts))
