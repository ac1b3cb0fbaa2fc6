"""A checkpoint for another number of processes: DeepSpeed's universal form, and random states under their new names."""

from __future__ import annotations

import contextlib
import shutil
import sys
from argparse import Namespace
from typing import TYPE_CHECKING

from lora_jobs.checkpoints import MANIFEST, load_manifest

if TYPE_CHECKING:
    from pathlib import Path


def needs_conversion(checkpoint: Path | None, world_size: int) -> bool:
    """Whether the checkpoint was saved by another number of processes."""
    return checkpoint is not None and load_manifest(checkpoint).world_size != world_size


def convert_checkpoint(checkpoint: Path, target: Path, *, world_size: int) -> Path:
    """A copy of a verified checkpoint in `target` that `world_size` processes can load; the checkpoint stays as it is.

    Under ZeRO the optimizer state is put together and loaded with load_universal, which the next save does not need.
    """
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(checkpoint, target, ignore=shutil.ignore_patterns(MANIFEST))
    rename_random_states(target, world_size)
    latest = target / "latest"
    if latest.is_file():
        merge_shards(target, latest.read_text(encoding="ascii").strip())
    return target


def rename_random_states(directory: Path, world_size: int) -> None:
    """Trainer looks for rng_state.pth where there is one process, for rng_state_RANK.pth where there are more."""
    one, first = directory / "rng_state.pth", directory / "rng_state_0.pth"
    if world_size == 1 and first.is_file():
        first.rename(one)
    elif world_size > 1 and one.is_file():
        one.rename(first)


def merge_shards(directory: Path, tag: str) -> None:
    """DeepSpeed's own conversion of `tag`, in this process. It unpickles: the shards have been verified before."""
    from deepspeed.checkpoint import ds_to_universal

    options = Namespace(
        input_folder=str(directory / tag),
        output_folder=str(directory / f"{tag}_universal"),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(sys.stderr):
        ds_to_universal.main(options)
