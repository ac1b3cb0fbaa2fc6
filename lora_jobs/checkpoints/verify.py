"""The verdict over one checkpoint: good, or what is wrong with it."""

from __future__ import annotations

import importlib.util
import re
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from lora_jobs.checkpoints.commit import READERS
from lora_jobs.checkpoints.manifest import Manifest, hash_file, list_files, load_manifest
from lora_jobs.checkpoints.structure import (
    check_completeness,
    check_name,
    check_structure,
    find_world_size,
    list_shards,
)
from lora_jobs.errors import CheckpointError, RunError

if TYPE_CHECKING:
    from pathlib import Path

_NAME = re.compile(r"checkpoint-(\d{1,18})", re.ASCII)


class CheckpointVerdict(Struct, frozen=True):
    """Whether training may go on from here; `reason` says what is wrong, or what was checked."""

    path: Path
    step: int | None
    good: bool
    reason: str
    committed_at: float | None = None
    manifest: Manifest | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "step": self.step,
            "good": self.good,
            "reason": self.reason,
            "committed_at": self.committed_at,
            "bytes": None if self.manifest is None else self.manifest.total_bytes,
        }


def find_step(directory: Path) -> int | None:
    """The number in a folder's name `checkpoint-N`; None for any other name."""
    match = _NAME.fullmatch(directory.name)
    return None if match is None else int(match[1])


def verify_checkpoint(directory: Path, *, level: int = 2) -> CheckpointVerdict:
    """Never raises for a bad checkpoint. Each level includes the ones below.

    0: manifest, files, sizes, step. 1: every file is whole by its own format (JSON, safetensors header, CRC of zip)
    and a pickle names nothing but what a checkpoint needs. 2: every byte is the one that was committed; this covers
    the CRCs, which are then not read a second time. 3: the parts tell one story; RunError where torch is missing.
    """
    step, manifest = find_step(directory), None
    try:
        _check_folder(directory)
        manifest = load_manifest(directory)
        step = manifest.step if step is None else step
        _check_committed(directory, manifest, level)
    except (CheckpointError, OSError) as error:
        return CheckpointVerdict(directory, step, good=False, reason=_explain(error, directory), manifest=manifest)
    reason = _describe_checks(len(manifest.files), level)
    return CheckpointVerdict(directory, step, True, reason, manifest.created_at, manifest)


def verify_foreign(directory: Path, *, level: int = 3) -> CheckpointVerdict:
    """A checkpoint of another tool, without a manifest: its structure (level 1) and meaning (level 3) only.

    Whether its bytes are the ones that were saved, nobody can tell. Never raises for a bad checkpoint.
    """
    step = find_step(directory)
    try:
        _check_folder(directory)
        names = _check_uncommitted(directory, step, level)
    except (CheckpointError, OSError) as error:
        return CheckpointVerdict(directory, step, good=False, reason=_explain(error, directory))
    what = "structure and meaning" if level >= 3 else "structure"
    reason = f"{_count(len(names))} without a manifest: {what} hold, nobody knows the bytes"
    return CheckpointVerdict(directory, step, True, reason)


def best_level() -> int:
    """The highest level that can be checked here: 3 with torch, else 2."""
    return 3 if all(importlib.util.find_spec(name) for name in ("torch", "safetensors")) else 2


def require_torch() -> None:
    """RunError where level 3 can't be checked."""
    if best_level() < 3:
        raise RunError(
            "level 3 compares tensors, and torch is not installed here",
            hint="use --level 2, or the job's environment: pip install 'lora-jobs[train]'",
        )


def _check_committed(directory: Path, manifest: Manifest, level: int) -> None:
    check_name(directory, manifest.files, step=manifest.step)
    _check_files(directory, manifest)
    if level >= 1:
        for name in manifest.files:
            check_structure(directory / name, name, crc=level == 1)
    if level >= 2:
        _check_hashes(directory, manifest)
    if level >= 3:
        _check_meaning(directory, list(manifest.files), manifest.step, manifest.world_size)


def _check_uncommitted(directory: Path, step: int | None, level: int) -> list[str]:
    names = list_files(directory)
    if step is None:
        raise CheckpointError(f"{directory.name} is not named checkpoint-N", path=directory)
    world_size = find_world_size(names)
    check_completeness(directory, names, step=step, world_size=world_size)
    for name in names:
        check_structure(directory / name, name, crc=True)
    if level >= 3:
        _check_meaning(directory, names, step, world_size)
    return names


def _check_meaning(directory: Path, names: list[str], step: int, world_size: int) -> None:
    require_torch()
    from lora_jobs.checkpoints.meaning import check_meaning  # it needs torch, and most callers do not

    check_meaning(directory, names, step=step, world_size=world_size)


def _explain(error: CheckpointError | OSError, directory: Path) -> str:
    if isinstance(error, CheckpointError):
        return error.message
    return f"{error.filename or directory} can't be read: {error.strerror}"


def _check_folder(directory: Path) -> None:
    if directory.is_symlink():
        raise CheckpointError(f"{directory} is a symbolic link", path=directory)
    if not directory.exists():
        raise CheckpointError(f"{directory} does not exist", path=directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory", path=directory)


def _check_files(directory: Path, manifest: Manifest) -> None:
    """The files of the manifest and no others, each of its size, all of the step of the folder's name."""
    names = list_files(directory)
    if missing := sorted(manifest.files.keys() - set(names)):
        raise CheckpointError(f"{missing[0]} is missing{_more(missing)}", path=directory)
    if unknown := sorted(set(names) - manifest.files.keys()):
        raise CheckpointError(f"{unknown[0]} is not in the manifest{_more(unknown)}", path=directory)
    for name, entry in manifest.files.items():
        size = (directory / name).stat().st_size
        if size != entry.bytes:
            raise CheckpointError(f"{name} is {size} bytes, {entry.bytes} were committed", path=directory)
    if manifest.shards is not None and (odd := set(manifest.shards) ^ set(list_shards(names, manifest.world_size))):
        what = f"the manifest's shards are not those of {manifest.world_size} ranks: {min(odd)}"
        raise CheckpointError(what, path=directory)
    check_completeness(directory, names, step=manifest.step, world_size=manifest.world_size)


def _check_hashes(directory: Path, manifest: Manifest) -> None:
    """Largest first, a few at once: one stream rarely reads as fast as the disk can."""
    from concurrent.futures import ThreadPoolExecutor  # and logging with it: only where it is worth it

    names = sorted(manifest.files, key=lambda name: -manifest.files[name].bytes)
    with ThreadPoolExecutor(max_workers=READERS) as readers:
        for name, found in zip(names, readers.map(lambda name: hash_file(directory / name), names), strict=True):
            if found != manifest.files[name].hash:
                readers.shutdown(wait=False, cancel_futures=True)
                raise CheckpointError(f"{name} is not what was committed: its hash differs", path=directory)


def _describe_checks(count: int, level: int) -> str:
    checked = ("sizes and step", "sizes, step and structure", "sizes, step, structure and hashes")
    return f"{_count(count)}: {[*checked, 'sizes, step, structure, hashes and meaning'][min(level, 3)]} hold"


def _count(files: int) -> str:
    return "1 file" if files == 1 else f"{files} files"


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
