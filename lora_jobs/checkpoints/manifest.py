"""MANIFEST.json: what a checkpoint holds, file by file, and how it is read back."""

from __future__ import annotations

import json
import os
import stat
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import xxhash
from msgspec import Struct, field
from msgspec.structs import asdict

from lora_jobs.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

MANIFEST = "MANIFEST.json"
PINNED = "PINNED"
"""A file of this name in a checkpoint keeps it: rotation leaves the folder alone. It is no part of what is verified."""
KIND = "lora-jobs checkpoint"
SCHEMA = 2
KNOWN_SCHEMAS = (1, 2)
HASH = "xxh3_128"
MAX_MANIFEST_BYTES = 16 * 1024**2
MAX_FILES = 100_000
_BLOCK_BYTES = 8 * 1024**2
_HASH_DIGITS = 32


class FileEntry(Struct, frozen=True):
    """One file of a checkpoint: its size in bytes, its xxh3_128 in hexadecimal, and the rank that wrote it."""

    bytes: int
    hash: str
    rank: int = 0


class AdapterDigest(Struct, frozen=True):
    """The adapter's tensors in short: their number, a hash of keys, shapes and dtypes, and one of all that and values.

    The second one can be taken of a model in memory too, so that what was loaded is compared with what was saved.
    """

    tensors: int
    structure: str
    content: str


class Manifest(Struct, frozen=True):
    """A committed checkpoint in words: the step, who wrote it, and every file by its relative path."""

    step: int
    world_size: int
    created_at: float
    files: Mapping[str, FileEntry]
    epoch: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    shards: tuple[str, ...] | None = None
    """The files of which every rank wrote its own, as they must be there for this world size; None in schema 1."""
    adapter: AdapterDigest | None = None

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
            "files": {name: asdict(entry) for name, entry in self.files.items()},
            "shards": list(self.shards or ()),
            "adapter": None if self.adapter is None else asdict(self.adapter),
            "metadata": dict(self.metadata),
        }


def render_manifest(manifest: Manifest) -> str:
    """The text of MANIFEST.json; its digest is over everything else in it, so that an edit shows."""
    values = manifest.to_json()
    return json.dumps({**values, "digest": _digest(values)}, indent=2, sort_keys=True, allow_nan=False) + "\n"


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
            if entry.name.startswith(".") or name in {MANIFEST, PINNED}:
                continue
            if entry.is_symlink():
                raise CheckpointError(f"{name} is a symbolic link", path=directory)
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(directory / entry.name, f"{name}/")
            elif entry.is_file(follow_symlinks=False):
                yield name
            else:
                raise CheckpointError(f"{name} is not a plain file", path=directory)


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
    schema = values.get("schema")
    if type(schema) is not int or schema not in KNOWN_SCHEMAS:
        raise ValueError(f"schema {schema!r} is not known here (wanted {SCHEMA})")
    if values.get("hash") != HASH:
        raise ValueError(f"hash {values.get('hash')!r} is not known here (wanted {HASH})")
    epoch = values.get("epoch")
    files = {_parse_name(name): _parse_entry(name, entry) for name, entry in _require(values, "files", dict).items()}
    return Manifest(
        step=_require(values, "step", int),
        world_size=_require(values, "world_size", int),
        created_at=_require(values, "created_at", float),
        files=files,
        epoch=None if epoch is None else _require(values, "epoch", float),
        metadata=_require(values, "metadata", dict),
        shards=_parse_shards(values, files) if schema >= 2 else None,
        adapter=_parse_adapter(values) if schema >= 2 else None,
    )


def _parse_shards(values: Mapping[str, Any], files: Mapping[str, FileEntry]) -> tuple[str, ...]:
    shards = _require(values, "shards", list)
    if not all(isinstance(name, str) and name in files for name in shards):
        raise ValueError(f"shards names what is not among the files: {shards}")
    return tuple(shards)


def _parse_adapter(values: Mapping[str, Any]) -> AdapterDigest | None:
    if values.get("adapter") is None:
        return None
    adapter = _require(values, "adapter", dict)
    hashes = [_parse_hash(f"adapter {key}", adapter.get(key)) for key in ("structure", "content")]
    return AdapterDigest(_require(adapter, "tensors", int), *hashes)


def _require(values: Mapping[str, Any], key: str, kind: type) -> Any:
    value = values.get(key)
    if type(value) is not kind or (isinstance(value, int) and value < 0):
        raise ValueError(f"{key} is {value!r}")
    return value


def _parse_name(name: str) -> str:
    path = PurePosixPath(name)
    if (
        path.is_absolute()
        or ".." in path.parts
        or path.as_posix() != name
        or name in {".", MANIFEST, PINNED}
        or "\0" in name
    ):
        raise ValueError(f"{name!r} is not a path inside the checkpoint")
    return name


def _parse_entry(name: str, entry: Any) -> FileEntry:
    if not isinstance(entry, dict):
        raise ValueError(f"{name} has no size and hash")
    digits = _parse_hash(name, entry.get("hash"))
    return FileEntry(_require(entry, "bytes", int), digits, _require({"rank": 0, **entry}, "rank", int))


def _parse_hash(name: str, digits: Any) -> str:
    if not isinstance(digits, str) or len(digits) != _HASH_DIGITS or set(digits) - set("0123456789abcdef"):
        raise ValueError(f"the hash of {name} is {digits!r}")
    return digits


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def _digest(values: Mapping[str, Any]) -> str:
    """xxh3_128 of the values in one canonical spelling."""
    return xxhash.xxh3_128(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
