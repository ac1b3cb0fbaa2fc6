"""MANIFEST.json: what a checkpoint holds, file by file. It is written last: no manifest, no checkpoint."""

from __future__ import annotations

import json
import math
import os
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import xxhash

from lora_jobs.checkpoints.structure import check_completeness, check_structure
from lora_jobs.errors import CheckpointError
from lora_jobs.runs.durable import sync_directory, write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

MANIFEST = "MANIFEST.json"
KIND = "lora-jobs checkpoint"
SCHEMA = 1
HASH = "xxh3_128"
MAX_MANIFEST_BYTES = 16 * 1024**2
MAX_FILES = 100_000
READERS = 4
_BLOCK_BYTES = 8 * 1024**2
_HASH_DIGITS = 32


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a checkpoint: its size in bytes and its xxh3_128 in hexadecimal."""

    bytes: int
    hash: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """A committed checkpoint in words: the step, who wrote it, and every file by its relative path."""

    step: int
    world_size: int
    created_at: float
    files: Mapping[str, FileEntry]
    epoch: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        return sum(entry.bytes for entry in self.files.values())

    def to_json(self) -> dict[str, Any]:
        """The content of MANIFEST.json, less its digest."""
        return {
            "kind": KIND,
            "schema": SCHEMA,
            "step": self.step,
            "epoch": self.epoch,
            "world_size": self.world_size,
            "created_at": self.created_at,
            "hash": HASH,
            "files": {name: {"bytes": entry.bytes, "hash": entry.hash} for name, entry in self.files.items()},
            "metadata": dict(self.metadata),
        }


def render_manifest(manifest: Manifest) -> str:
    """The text of MANIFEST.json; its digest is over everything else in it, so that an edit shows."""
    values = manifest.to_json()
    return json.dumps({**values, "digest": _digest(values)}, indent=2, sort_keys=True, allow_nan=False) + "\n"


def commit_checkpoint(
    directory: Path, *, step: int, world_size: int, metadata: Mapping[str, Any] | None = None
) -> Manifest:
    """Make what lies in `directory` a checkpoint: check it, flush it to the disk, and write its manifest last.

    CheckpointError when a file is incomplete (a rank's part missing, a file cut short by a full disk): then there is
    no manifest and the checkpoint does not count.
    """
    names = list_files(directory)
    try:
        check_completeness(directory, names, step=step, world_size=world_size)
        for name in names:
            check_structure(directory / name, name)
        files = _flush_files(directory, names)
        epoch = _read_epoch(directory)
    except OSError as error:
        where = error.filename or directory
        raise CheckpointError(f"{where} can't be committed: {error.strerror}", path=directory) from error
    manifest = Manifest(step, world_size, time.time(), files, epoch, _as_json(metadata or {}))
    write_atomic(directory / MANIFEST, render_manifest(manifest))
    return manifest


def load_manifest(directory: Path) -> Manifest:
    """The manifest of `directory`, read strictly. CheckpointError says what is wrong with it."""
    path = directory / MANIFEST
    try:
        values = json.loads(_read_small(path), parse_constant=_refuse_constant)
        manifest = _parse_manifest(values)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a manifest: {error}", path=directory) from error
    digest = values.pop("digest", None)
    if digest != _digest(values):
        raise CheckpointError(f"{path} was changed after it was written", path=directory)
    return manifest


def list_files(directory: Path) -> list[str]:
    """Relative paths of every file of a checkpoint, sorted; the manifest and hidden files are no part of it.

    CheckpointError for a symbolic link or anything else that is not a plain file or directory.
    """
    try:
        names = sorted(_walk(directory, ""))
    except OSError as error:
        raise CheckpointError(f"{error.filename} can't be read: {error.strerror}", path=directory) from error
    if len(names) > MAX_FILES:
        raise CheckpointError(f"{directory} holds more than {MAX_FILES} files", path=directory)
    return names


def hash_file(path: Path) -> str:
    """xxh3_128 of a file, in hexadecimal."""
    state = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            state.update(block)
    return state.hexdigest()


def _walk(directory: Path, prefix: str) -> Iterator[str]:
    with os.scandir(directory) as entries:
        for entry in entries:
            name = prefix + entry.name
            if entry.name.startswith(".") or name == MANIFEST:
                continue
            if entry.is_symlink():
                raise CheckpointError(f"{name} is a symbolic link", path=directory)
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(directory / entry.name, f"{name}/")
            elif entry.is_file(follow_symlinks=False):
                yield name
            else:
                raise CheckpointError(f"{name} is not a plain file", path=directory)


def _flush_files(directory: Path, names: Sequence[str]) -> dict[str, FileEntry]:
    """Every file and every folder on the disk, and what it holds."""
    from concurrent.futures import ThreadPoolExecutor  # and logging with it: only where it is worth it

    with ThreadPoolExecutor(max_workers=READERS) as readers:
        entries = list(readers.map(lambda name: _flush_and_hash(directory / name), names))
    for folder in sorted({(directory / name).parent for name in names} | {directory}):
        sync_directory(folder)
    return dict(zip(names, entries, strict=True))


def _flush_and_hash(path: Path) -> FileEntry:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return FileEntry(path.stat().st_size, hash_file(path))


def _read_epoch(directory: Path) -> float | None:
    try:
        epoch = json.loads((directory / "trainer_state.json").read_bytes()).get("epoch")
    except FileNotFoundError:
        return None
    return float(epoch) if isinstance(epoch, int | float) and math.isfinite(epoch) else None


def _as_json(value: Any) -> Any:
    """The value as it comes back from JSON; a number that JSON has not (a loss that became NaN) is null."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def _read_small(path: Path) -> bytes:
    """At most MAX_MANIFEST_BYTES of a plain file; a link is not followed and a pipe is not waited for."""
    directory = path.parent
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise CheckpointError(f"no {MANIFEST}: the save was not finished", path=directory) from error
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}", path=directory) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a plain file", path=directory)
        if status.st_size > MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes", path=directory)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(MAX_MANIFEST_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}", path=directory) from error
    finally:
        os.close(descriptor)


def _parse_manifest(values: Any) -> Manifest:
    """A manifest out of JSON values. ValueError, in words, for anything that commit_checkpoint does not write."""
    if not isinstance(values, dict) or values.get("kind") != KIND:
        raise ValueError(f"kind is not {KIND!r}")
    if values.get("schema") != SCHEMA:
        raise ValueError(f"schema {values.get('schema')!r} is not known here (wanted {SCHEMA})")
    if values.get("hash") != HASH:
        raise ValueError(f"hash {values.get('hash')!r} is not known here (wanted {HASH})")
    epoch = values.get("epoch")
    files = _require(values, "files", dict)
    return Manifest(
        step=_require(values, "step", int),
        world_size=_require(values, "world_size", int),
        created_at=_require(values, "created_at", float),
        files={_parse_name(name): _parse_entry(name, entry) for name, entry in files.items()},
        epoch=None if epoch is None else _require(values, "epoch", float),
        metadata=_require(values, "metadata", dict),
    )


def _require(values: Mapping[str, Any], key: str, kind: type) -> Any:
    value = values.get(key)
    if type(value) is not kind or (isinstance(value, int) and value < 0):
        raise ValueError(f"{key} is {value!r}")
    return value


def _parse_name(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or path.as_posix() != name or name in {".", MANIFEST} or "\0" in name:
        raise ValueError(f"{name!r} is not a path inside the checkpoint")
    return name


def _parse_entry(name: str, entry: Any) -> FileEntry:
    if not isinstance(entry, dict):
        raise ValueError(f"{name} has no size and hash")
    digits = entry.get("hash")
    if not isinstance(digits, str) or len(digits) != _HASH_DIGITS or set(digits) - set("0123456789abcdef"):
        raise ValueError(f"the hash of {name} is {digits!r}")
    return FileEntry(_require(entry, "bytes", int), digits)


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def _digest(values: Mapping[str, Any]) -> str:
    """xxh3_128 of the values in one canonical spelling."""
    return xxhash.xxh3_128(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
