"""How many tokens the rows of a data file have, as `lora-jobs data` counted them: a cache in the runs folder.

One small file for each key (data, tokenizer, format) in <runs>/lengths/. What reads it needs no tokenizer.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

from msgspec import Struct

from lora_jobs.runs.durable import explain_errors, write_atomic

if TYPE_CHECKING:
    from pathlib import Path

FOLDER = "lengths"


class RowLengths(Struct, frozen=True):
    """Tokens of every row that was counted, before anything is left out; `more`: there are rows beyond them."""

    lengths: tuple[int, ...]
    more: bool


def record_lengths(root: Path, key: str, found: RowLengths) -> None:
    """Keeps what was counted, of each length its number of rows. Raises RunError."""
    folder = root / FOLDER
    with explain_errors("make the directory", folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    counts = sorted(Counter(found.lengths).items())
    write_atomic(folder / f"{key}.json", json.dumps({"more": found.more, "counts": counts}) + "\n")


def load_lengths(root: Path, key: str) -> RowLengths | None:
    """The lengths, in ascending order; None where none were counted, or what is there can't be read as such."""
    try:
        values = json.loads((root / FOLDER / f"{key}.json").read_text(encoding="ascii"))
        lengths = tuple(length for length, rows in values["counts"] for _ in range(rows))
        return RowLengths(lengths, bool(values["more"])) if all(type(length) is int for length in lengths) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
