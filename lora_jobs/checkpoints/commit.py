"""The commit: each rank makes its own files durable and hashes them, then one manifest is written, last.

No manifest, no checkpoint. No directory is ever renamed to publish one.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from typing import TYPE_CHECKING, Any

from lora_jobs.checkpoints.manifest import MANIFEST, FileEntry, Manifest, hash_file, list_files, render_manifest
from lora_jobs.checkpoints.structure import (
    STATE,
    check_completeness,
    check_structure,
    find_world_size,
    list_shards,
    load_trainer_state,
)
from lora_jobs.checkpoints.tensors import ADAPTER_WEIGHTS, digest_adapter
from lora_jobs.errors import CheckpointError
from lora_jobs.runs.durable import sync_directory, write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

READERS = 4
VISIBLE_SECONDS = 30.0
# Trainer's random states and DeepSpeed's shards carry the number of the rank that writes them. Everything else is
# rank 0's. Source: Trainer._save_rng_state, DeepSpeedEngine._get_zero_ckpt_prefix.
_OWN = re.compile(r"(?:.*/)?(?:rng_state_|(?:bf16_|fp16_)?zero_pp_rank_)(\d+)[._].*")


def commit_checkpoint(
    directory: Path, *, step: int, world_size: int, metadata: Mapping[str, Any] | None = None
) -> Manifest:
    """Commit what lies in `directory` from one process, for all ranks: check, flush, hash, manifest last.

    CheckpointError when a file is incomplete (a rank's part missing, a file cut short by a full disk): then there is
    no manifest and the checkpoint does not count.
    """
    files: dict[str, FileEntry] = {}
    for rank in range(world_size):
        files |= flush_part(directory, rank=rank, world_size=world_size)
    return write_manifest(directory, files, step=step, world_size=world_size, metadata=metadata)


def adopt_checkpoint(directory: Path) -> Manifest:
    """Commit another tool's checkpoint as it lies there, on the user's word: from now on its bytes are known.

    CheckpointError where it is incomplete.
    """
    names = list_files(directory)
    step = load_trainer_state(directory).get("global_step")
    if not isinstance(step, int):
        raise CheckpointError(f"{STATE} says no step", path=directory)
    metadata = {"accepted_unverified": True}
    return commit_checkpoint(directory, step=step, world_size=find_world_size(names), metadata=metadata)


def flush_part(directory: Path, *, rank: int, world_size: int) -> dict[str, FileEntry]:
    """One rank's part of a commit: the files that it wrote are whole, on the disk, and hashed. CheckpointError.

    A rank that had nothing to write may not even see the folder yet.
    """
    if rank > 0 and not directory.exists():
        return {}
    from concurrent.futures import ThreadPoolExecutor  # and logging with it: only where it is worth it

    names = [name for name in list_files(directory) if find_writer(name, world_size) == rank]
    try:
        for name in names:
            check_structure(directory / name, name)
        with ThreadPoolExecutor(max_workers=READERS) as readers:
            entries = list(readers.map(lambda name: _flush_and_hash(directory / name, rank), names))
        for folder in sorted({(directory / name).parent for name in names} | {directory}):
            sync_directory(folder)
    except OSError as error:
        where = error.filename or directory
        raise CheckpointError(f"{where} can't be committed: {error.strerror}", path=directory) from error
    return dict(zip(names, entries, strict=True))


def write_manifest(
    directory: Path,
    files: Mapping[str, FileEntry],
    *,
    step: int,
    world_size: int,
    metadata: Mapping[str, Any] | None = None,
) -> Manifest:
    """The last act of a commit, by one process: every rank's part is there and seen from here, then MANIFEST.json.

    CheckpointError when a part is missing or another process's file does not appear within 30 s.
    """
    try:
        check_completeness(directory, files, step=step, world_size=world_size)
        wait_until_visible(directory, files)
        sync_directory(directory.parent)  # the folder's own name: rotation takes older ones away after this
        epoch = _read_epoch(directory)
        weights = directory / ADAPTER_WEIGHTS
        adapter = digest_adapter(weights) if ADAPTER_WEIGHTS in files else None
    except OSError as error:
        where = error.filename or directory
        raise CheckpointError(f"{where} can't be committed: {error.strerror}", path=directory) from error
    manifest = Manifest(
        step,
        world_size,
        time.time(),
        dict(sorted(files.items())),
        epoch,
        _as_json(metadata or {}),
        shards=tuple(list_shards(files, world_size)),
        adapter=adapter,
    )
    write_atomic(directory / MANIFEST, render_manifest(manifest))
    return manifest


def find_writer(name: str, world_size: int) -> int:
    """The rank that writes a file, by its name; rank 0 answers for whatever carries no rank of this world."""
    match = _OWN.fullmatch(name)
    rank = int(match[1]) if match else 0
    return rank if rank < world_size else 0


def wait_until_visible(
    directory: Path, files: Mapping[str, FileEntry], *, timeout_seconds: float = VISIBLE_SECONDS
) -> None:
    """Return once every file has its size when seen from this host: a network file system may show it late."""
    deadline = time.monotonic() + timeout_seconds
    while hidden := list(_list_hidden(directory, files)):
        if time.monotonic() > deadline:
            entry = files[hidden[0]]
            raise CheckpointError(
                f"{hidden[0]} of rank {entry.rank} ({entry.bytes} bytes) is not seen by rank 0: "
                "is the run's directory on a file system that all nodes share?",
                path=directory,
            )
        time.sleep(0.1)


def _list_hidden(directory: Path, files: Mapping[str, FileEntry]) -> Iterable[str]:
    for name, entry in files.items():
        try:
            if (directory / name).stat().st_size != entry.bytes:
                yield name
        except FileNotFoundError:
            yield name


def _flush_and_hash(path: Path, rank: int) -> FileEntry:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return FileEntry(path.stat().st_size, hash_file(path), rank)


def _read_epoch(directory: Path) -> float | None:
    try:
        epoch = json.loads((directory / STATE).read_bytes()).get("epoch")
    except FileNotFoundError:
        return None
    return float(epoch) if isinstance(epoch, int | float) and math.isfinite(epoch) else None


def _as_json(value: Any) -> Any:
    """The value as it comes back from JSON; a number that JSON has not (a loss that became NaN) is null."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)
