"""What the token counts of a data file depend on, and the rows that training will use by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from lora_jobs.runs import find_runs_root, load_lengths
from lora_jobs.sizing.duration import Rows, count_row_tokens, keep_rows
from lora_jobs.spec import iterate_rows
from lora_jobs.units import format_count

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_jobs.spec import JobSpec

# What a tokenizer that lies in a directory is made of.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")

FAR_BELOW = 0.75
"""Part of data.max_length under which all rows have to stay before a smaller one is proposed."""


def find_key(spec: JobSpec, name: str) -> str | None:
    """One key for the same rows, tokenizer and format; None for a directory that only `datasets` can read."""
    data = spec.data
    instruction = data.instruction if data.format == "svg_caption" else None
    if data.dataset is None:
        path = Path(name)
        rows: object = _hash_file(path) if path.is_file() else None
    elif data.names_dataset_directory():
        rows = None
    else:
        rows = [data.dataset, data.dataset_revision, data.dataset_config, name]
    if rows is None:
        return None
    parts = json.dumps([rows, _name_tokenizer(spec), data.format, instruction])
    return xxhash.xxh3_128_hexdigest(parts.encode())


def _hash_file(path: Path) -> str:
    from lora_jobs.checkpoints.manifest import hash_file  # loads the whole engine; most checks hash nothing

    return hash_file(path)


def _name_tokenizer(spec: JobSpec) -> list[str | None]:
    """A directory's tokenizer by its content, another by its name and revision."""
    directory = Path(spec.model.name_or_path)
    if not directory.is_dir():
        return [spec.model.name_or_path, spec.model.revision]
    return [_hash_file(path) if (path := directory / name).is_file() else None for name in TOKENIZER_FILES]


def load_rows(spec: JobSpec) -> tuple[Rows | None, Rows | None]:
    """Token counts of the training and evaluation rows; None where the data is not here or has no usable row."""
    return _load_part(spec, spec.data.train), _load_part(spec, spec.data.eval)


def describe_basis(rows: Rows) -> str:
    """Where the lengths come from, in words."""
    if rows.basis == "guessed":
        return "guessed from characters (lora-jobs data counts them)"
    if rows.basis == "counted":
        return "counted by lora-jobs data"
    return f"counted of the first {format_count(rows.counted)}, the others by their characters"


def judge_lengths(spec: JobSpec, parts: tuple[Rows | None, Rows | None]) -> Iterator[str]:
    """What counted lengths say of data.max_length: rows that it leaves out, or that it is far above them all."""
    limit, step = spec.data.max_length, max(8, spec.data.pad_to_multiple_of or 1)
    for key, rows in zip(("data.train", "data.eval"), parts, strict=True):
        if rows is not None and rows.basis == "counted" and rows.too_long:
            share = f"{format_count(rows.too_long)} of {format_count(len(rows.lengths) + rows.too_long)} rows"
            yield f"{key}: {share} are longer than data.max_length {limit}: left out"
    known = [rows for rows in parts if rows is not None]
    if spec.data.packing or not known or any(rows.basis != "counted" or rows.too_long for rows in known):
        return
    longest = -(-max(max(rows.lengths) for rows in known) // step) * step
    if longest <= FAR_BELOW * limit:
        yield f"no row is longer than {longest} tokens: --set data.max_length={longest} would need less memory"


def _load_part(spec: JobSpec, name: str | None) -> Rows | None:
    """By what `lora-jobs data` counted; rows that it did not reach, by their characters at the counted rows' rate."""
    if name is None or (key := find_key(spec, name)) is None:
        return None
    counted = load_lengths(find_runs_root(), key)
    known = counted.lengths if counted is not None else ()
    if counted is not None and not counted.more:
        return keep_rows(known, spec.data.max_length, counted=len(known))
    if spec.data.dataset is not None:
        return None
    extra = len(spec.data.instruction or "") if spec.data.format == "svg_caption" else 0
    characters = [_count_text(row) + extra for row in iterate_rows(Path(name))]
    if known and (seen := sum(characters[: len(known)])):
        rate = sum(known) / seen
        rest = [max(1, round(count * rate)) for count in characters[len(known) :]]
    else:
        rest = [count_row_tokens(count) for count in characters]
    return keep_rows([*known, *rest], spec.data.max_length, counted=len(known))


def _count_text(value: Any) -> int:
    """Characters of every text in a row: rows hold little beside what is trained on."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_count_text(part) for key, part in value.items() if key != "role")
    return sum(_count_text(part) for part in value) if isinstance(value, list) else 0
