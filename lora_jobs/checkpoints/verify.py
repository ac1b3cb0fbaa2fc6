"""The verdict over one checkpoint: good, or what is wrong with it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_jobs.checkpoints.manifest import READERS, Manifest, hash_file, list_files, load_manifest
from lora_jobs.checkpoints.structure import check_completeness, check_name, check_structure
from lora_jobs.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

_NAME = re.compile(r"checkpoint-(\d{1,18})", re.ASCII)


@dataclass(frozen=True, slots=True)
class CheckpointVerdict:
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

    0: manifest, files, sizes, step. 1: every file is whole by its own format (JSON, safetensors header, CRC of zip).
    2: every byte is the one that was committed; this covers the CRCs, which are then not read a second time.
    """
    step = find_step(directory)
    manifest = None
    try:
        _check_folder(directory)
        manifest = load_manifest(directory)
        step = manifest.step if step is None else step
        check_name(directory, manifest.files, step=manifest.step)
        _check_files(directory, manifest)
        if level >= 1:
            for name in manifest.files:
                check_structure(directory / name, name, crc=level == 1)
        if level >= 2:
            _check_hashes(directory, manifest)
    except CheckpointError as error:
        return CheckpointVerdict(directory, step, good=False, reason=error.message, manifest=manifest)
    except OSError as error:
        reason = f"{error.filename or directory} can't be read: {error.strerror}"
        return CheckpointVerdict(directory, step, good=False, reason=reason, manifest=manifest)
    reason = _describe_checks(manifest, level)
    return CheckpointVerdict(directory, step, True, reason, manifest.created_at, manifest)


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


def _describe_checks(manifest: Manifest, level: int) -> str:
    count = len(manifest.files)
    files = "1 file" if count == 1 else f"{count} files"
    return {0: f"{files}: sizes and step hold", 1: f"{files}: sizes, step and structure hold"}.get(
        level, f"{files}: sizes, step, structure and hashes hold"
    )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
