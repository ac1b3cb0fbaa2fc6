"""Is a checkpoint complete, and is each file what its name says? Without torch, and without unpickling anything."""

from __future__ import annotations

import json
import math
import re
import zipfile
import zlib
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from lora_jobs.checkpoints.pickles import check_archive
from lora_jobs.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

MAX_JSON_BYTES = 256 * 1024**2
# safetensors itself refuses a longer header. Source: safetensors, MAX_HEADER_SIZE.
MAX_HEADER_BYTES = 100_000_000
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
# What each rank writes for itself: Trainer's random states where there are several, DeepSpeed's optimizer shards, and
# its model states under ZeRO-3. Source: Trainer._save_rng_state, DeepSpeedEngine._get_ckpt_name, _get_zero_ckpt_name.
_OWN = re.compile(
    r"(?P<start>rng_state_|(?P<tag>[^/]+)/(?:bf16_|fp16_)?zero_pp_rank_)(?P<rank>\d+)"
    r"(?P<end>\.pth|_mp_rank_\d+_(?:optim|model)_states\.pt)"
)
_MODEL = re.compile(r"(?P<tag>[^/]+)/(?:zero_pp_rank_\d+_)?mp_rank_\d+_model_states\.pt")
_TORCH_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".pkl", ".ckpt"})
# Trainer leaves a pickle of its arguments in every folder, and nothing ever loads it.
_NEVER_LOADED = frozenset({"training_args.bin"})
STATE = "trainer_state.json"


def check_completeness(directory: Path, names: Collection[str], *, step: int, world_size: int) -> None:
    """Every rank's part is there and all speak of the same step; CheckpointError says what is missing.

    A finished adapter (a folder of another name, without trainer_state.json) needs no training state.
    """
    if not names:
        raise CheckpointError("the folder is empty", path=directory)
    if not is_resumable(directory, names):
        return
    check_name(directory, names, step=step)
    if STATE not in names:
        raise CheckpointError(f"{STATE} is missing", path=directory)
    seen = load_trainer_state(directory).get("global_step")
    if seen != step:
        raise CheckpointError(f"{STATE} is of step {seen}, the checkpoint of step {step}", path=directory)
    _check_ranks(directory, names, world_size)


def load_trainer_state(directory: Path) -> dict[str, Any]:
    """trainer_state.json; empty where it holds no object. CheckpointError when it is not JSON."""
    found = _read_json(directory / STATE, STATE)
    return found if isinstance(found, dict) else {}


def check_name(directory: Path, names: Collection[str], *, step: int) -> None:
    """A checkpoint to train on from is named after its step; an adapter may be named as one likes."""
    if is_resumable(directory, names) and directory.name != f"checkpoint-{step}":
        raise CheckpointError(f"the folder is named {directory.name}, its content is checkpoint-{step}", path=directory)


def is_resumable(directory: Path, names: Collection[str]) -> bool:
    """Is this meant to be trained on from, rather than a finished adapter?"""
    return directory.name.startswith("checkpoint-") or STATE in names


def find_world_size(names: Collection[str]) -> int:
    """How many ranks wrote this, by the numbers in the names of their files; at least 1."""
    return max((int(match["rank"]) for name in names if (match := _OWN.fullmatch(name))), default=0) + 1


def list_shards(names: Collection[str], world_size: int) -> list[str]:
    """The files that must be there once for each rank: where one rank's is among `names`, that of every rank."""
    kinds = {(match["start"], match["end"]) for name in names if (match := _OWN.fullmatch(name))}
    return sorted(f"{start}{rank}{end}" for start, end in kinds for rank in range(world_size))


def _check_ranks(directory: Path, names: Collection[str], world_size: int) -> None:
    """One part of each rank and of no other, and all that the training goes on from."""
    found = {name: match for name in names if (match := _OWN.fullmatch(name))}
    if strange := next((name for name, match in found.items() if int(match["rank"]) >= world_size), None):
        rank = int(found[strange]["rank"])
        raise CheckpointError(f"{strange} is of rank {rank}, and there are {world_size} ranks", path=directory)
    random_states = ["rng_state.pth"] if world_size == 1 else [f"rng_state_{rank}.pth" for rank in range(world_size)]
    wanted = [*random_states, *list_shards(names, world_size)]
    if missing := next((name for name in wanted if name not in names), None):
        ranks = f" ({world_size} ranks)" if world_size > 1 else ""
        raise CheckpointError(f"{missing} is missing{ranks}", path=directory)
    if "scheduler.pt" not in names:
        raise CheckpointError("scheduler.pt is missing", path=directory)
    tags = {match["tag"] for match in found.values() if match["tag"]}
    states = {match["tag"] for name in names if (match := _MODEL.fullmatch(name))}
    if without := sorted(tags - states):
        raise CheckpointError(f"{without[0]}: the model states are missing", path=directory)
    if "latest" not in names:
        if tags | states:
            raise CheckpointError("latest is missing: it names DeepSpeed's folder", path=directory)
        if "optimizer.pt" not in names:
            raise CheckpointError("no optimizer state: neither optimizer.pt nor DeepSpeed's folder", path=directory)
        return
    tag = (directory / "latest").read_bytes()[:256].decode(errors="replace").strip()
    if not tag or not any(name.startswith(f"{tag}/") for name in names):
        raise CheckpointError(f"latest names the folder {tag!r}, which is not there", path=directory)
    if tag not in states:
        raise CheckpointError(f"{tag}: the model states are missing", path=directory)


def check_structure(path: Path, name: str, *, crc: bool = False) -> None:
    """CheckpointError when a file can't be what its name says; `crc` also reads every byte of a zip archive.

    A torch file is good only when its pickle names nothing but what a checkpoint needs.
    """
    suffix = PurePosixPath(name).suffix
    try:
        if suffix == ".json":
            _read_json(path, name)
        elif suffix == ".safetensors":
            _check_safetensors(path, name)
        elif suffix in _TORCH_SUFFIXES:
            _check_zip(path, name, crc=crc)
    except OSError as error:
        raise CheckpointError(f"{name} can't be read: {error.strerror}", path=path) from error


def _read_json(path: Path, name: str) -> Any:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{name} is larger than {MAX_JSON_BYTES} bytes", path=path)
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not JSON: {error}", path=path) from error


def _check_safetensors(path: Path, name: str) -> None:
    """Length, header and data add up: 8 bytes of header length, the header in JSON, then the tensors without a gap.

    Source: the safetensors README, section Format.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{name} is cut short: {size} bytes, no whole header", path=path)
        try:
            header = json.loads(file.read(length))
            end = _end_of_tensors([tensor for key, tensor in header.items() if key != "__metadata__"])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{name} has a damaged safetensors header: {error}", path=path) from error
    if 8 + length + end != size:
        raise CheckpointError(f"{name} is {size} bytes, its header describes {8 + length + end}", path=path)


def _end_of_tensors(tensors: Sequence[dict[str, Any]]) -> int:
    """Bytes of all tensors; ValueError when one overlaps, leaves a gap or does not fill its place."""
    end = 0
    for tensor in sorted(tensors, key=lambda entry: tuple(entry["data_offsets"])):
        start, stop = tensor["data_offsets"]
        wanted = math.prod(tensor["shape"]) * _BITS.get(tensor["dtype"], 0) // 8
        if start != end or (tensor["dtype"] in _BITS and stop - start != wanted):
            raise ValueError(f"tensor of shape {tensor['shape']} at bytes {start} to {stop}")
        end = stop
    return end


def _check_zip(path: Path, name: str, *, crc: bool) -> None:
    """torch.save writes a zip archive; its directory stands at the end, so a file cut short has none."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            damaged = archive.testzip() if crc else None
            file.seek(0)
            start = file.read(4)
            if damaged is None and PurePosixPath(name).name not in _NEVER_LOADED:
                _check_pickle(archive, start, path, name)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{name} is not a whole torch file: {error}", path=path) from error
    if damaged is not None:
        raise CheckpointError(f"{name} is damaged inside: {damaged} fails its checksum", path=path)


def _check_pickle(archive: zipfile.ZipFile, start: bytes, path: Path, name: str) -> None:
    try:
        check_archive(archive, start)
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{name} is not safe to load: {error}", path=path) from error
