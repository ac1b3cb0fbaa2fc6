"""Checkpoints of a test, written or committed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from small_checkpoints import write_checkpoint

from lora_jobs.checkpoints import commit_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Write a checkpoint of a step into the test's folder, not committed."""

    def save_step(step: int, **shape: Any) -> Path:
        directory = tmp_path / f"checkpoint-{step}"
        write_checkpoint(directory, step=step, **shape)
        return directory

    return save_step


@pytest.fixture
def commit(save: Callable[..., Path]) -> Callable[..., Path]:
    """Write a checkpoint of a step and commit it."""

    def commit_step(step: int, **shape: Any) -> Path:
        directory = save(step, **shape)
        commit_checkpoint(directory, step=step, world_size=shape.get("world_size", 1), metadata={"job_id": "7"})
        return directory

    return commit_step
