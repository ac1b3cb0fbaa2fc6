"""The adapter's tensors as bytes: a digest of them that needs no torch, from the file or from a model in memory."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import xxhash

from lora_jobs.checkpoints.manifest import AdapterDigest
from lora_jobs.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def digest_tensors(tensors: Iterable[tuple[str, str, Sequence[int], bytes | memoryview]]) -> AdapterDigest:
    """The digest of (key, safetensors' name of the dtype, shape, bytes), which come in the order of their keys."""
    count, structure, content = 0, xxhash.xxh3_128(), xxhash.xxh3_128()
    for key, dtype, shape, data in tensors:
        line = f"{key} {dtype} {list(shape)}\n".encode()
        structure.update(line)
        content.update(line)
        content.update(data)
        count += 1
    return AdapterDigest(count, structure.hexdigest(), content.hexdigest())


def digest_adapter(path: Path) -> AdapterDigest:
    """The digest of a safetensors file whose structure was checked. CheckpointError when it changed since."""
    header, start = read_header(path)
    with path.open("rb") as file:

        def read() -> Iterable[tuple[str, str, Sequence[int], bytes | memoryview]]:
            for key in sorted(header):
                begin, end = header[key]["data_offsets"]
                file.seek(start + begin)
                yield key, header[key]["dtype"], header[key]["shape"], file.read(end - begin)

        return digest_tensors(read())


def read_header(path: Path) -> tuple[Mapping[str, Any], int]:
    """The tensors of a safetensors file by key (dtype, shape, data_offsets), and where their data starts in bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path.name} has a damaged safetensors header: {error}", path=path) from error
    return {key: value for key, value in header.items() if key != "__metadata__"}, 8 + length
