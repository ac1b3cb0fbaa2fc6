"""A verdict for every checkpoint of a run, or of a directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from lora_jobs.checkpoints import (
    MANIFEST,
    best_level,
    list_checkpoints,
    require_torch,
    verify_checkpoint,
    verify_foreign,
)
from lora_jobs.errors import CheckpointError
from lora_jobs.runs import find_run, find_runs_root

if TYPE_CHECKING:
    from lora_jobs.checkpoints import CheckpointVerdict


def verify_path_or_run(target: str | None, *, level: int = 2) -> tuple[CheckpointVerdict, ...]:
    """A verdict per checkpoint, newest first (and the finished adapter), of a run or of one directory.

    Errors: RunNotFoundError when it is neither; CheckpointError when there is nothing to verify; RunError for level 3
    without torch.
    """
    if level >= 3:
        require_torch()
    return tuple(verify_one(directory, level=level) for directory in list_directories(target))


def list_directories(target: str | None) -> list[Path]:
    """What a PATH or a JOB means: the checkpoints in it, newest first, after the finished adapter; or itself."""
    path = Path(target) if target else None
    if path is not None and path.is_dir() and not (path / "spec.yaml").exists():
        return list_checkpoints(path) or [path]
    run = find_run(target, find_runs_root())
    directories = [*([run.adapter] if run.adapter.is_dir() else []), *list_checkpoints(run.checkpoints)]
    if not directories:
        raise CheckpointError(
            f"{run.id} has no checkpoint yet",
            path=run.checkpoints,
            hint="one is committed every training.save_steps steps and at a signal",
        )
    return directories


def verify_one(directory: Path, *, level: int) -> CheckpointVerdict:
    """The verdict; for a folder without a manifest it also says whether structure and meaning hold (another tool's)."""
    verdict = verify_checkpoint(directory, level=level)
    if verdict.good or not (directory / "trainer_state.json").is_file() or os.path.lexists(directory / MANIFEST):
        return verdict
    foreign = verify_foreign(directory, level=best_level())
    taken = "; resume --accept-unverified takes it" if foreign.good else ""
    return replace(verdict, reason=f"{verdict.reason}; {foreign.reason}{taken}")
