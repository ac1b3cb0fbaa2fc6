"""What the examples of a spec become: a few of them, masked as in training, and how long all of them are."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from lora_jobs.cluster.commands import run_command
from lora_jobs.errors import RunError, SpecError
from lora_jobs.runs import RowLengths, find_runs_root, record_lengths
from lora_jobs.spec import find_data_problems, load_document, load_environment
from lora_jobs.workflows.checking import anchor_paths
from lora_jobs.workflows.lengths import find_key

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lora_jobs.spec import JobSpec

PREVIEW_SECONDS = 1800.0
BINS = 12


class Piece(Struct, frozen=True):
    """A run of an example's tokens that are all learned, or all masked."""

    text: str
    tokens: int
    learned: bool


class Part(Struct, frozen=True):
    """One file or split. `lengths`: tokens of every row that was read, in order; `more`: there are rows beyond them."""

    name: str
    examples: tuple[tuple[Piece, ...], ...]
    lengths: tuple[int, ...]
    learned: int
    empty: int
    more: bool

    def count_too_long(self, max_length: int) -> int:
        """Rows that training leaves out."""
        return sum(length > max_length for length in self.lengths)

    def find_quantile(self, share: float) -> int:
        """Tokens of the row below which `share` of the rows lie; 0 without rows."""
        ordered = sorted(self.lengths)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0

    def count_bins(self) -> tuple[tuple[int, int, int], ...]:
        """The histogram: (from, to, rows) with from <= tokens < to, in at most 12 steps of equal width."""
        if not self.lengths:
            return ()
        lowest, highest = min(self.lengths), max(self.lengths)
        width = -(-(highest - lowest + 1) // BINS)
        counts = Counter((length - lowest) // width for length in self.lengths)
        starts = range(lowest, highest + 1, width)
        return tuple((start, start + width, counts[index]) for index, start in enumerate(starts))

    def to_json(self, max_length: int) -> dict[str, Any]:
        return {
            "name": self.name,
            "rows": len(self.lengths),
            "more": self.more,
            "too_long": self.count_too_long(max_length),
            "empty": self.empty,
            "tokens": sum(self.lengths),
            "learned_tokens": self.learned,
            "longest": max(self.lengths, default=0),
            "median": self.find_quantile(0.5),
            "p95": self.find_quantile(0.95),
            "histogram": [{"from": start, "to": end, "rows": rows} for start, end, rows in self.count_bins()],
            "examples": [
                [{"text": piece.text, "tokens": piece.tokens, "learned": piece.learned} for piece in example]
                for example in self.examples
            ],
        }


class Preview(Struct, frozen=True):
    """What `lora-jobs data` shows."""

    spec: JobSpec
    train: Part
    evaluation: Part | None
    unkept: str | None = None
    """Why the lengths were not kept for `check` and `plan`."""

    def to_json(self) -> dict[str, Any]:
        longest = self.spec.data.max_length
        return {
            "name": self.spec.name,
            "max_length": longest,
            "train": self.train.to_json(longest),
            "eval": None if self.evaluation is None else self.evaluation.to_json(longest),
            "kept": self.unkept is None,
        }


def preview_job(path: Path, overrides: Sequence[str] = (), *, rows: int, examples: int) -> Preview:
    """Tokenize the first `rows` rows with the job's own tokenizer and template.

    Errors: SpecError for what is wrong in the files, or where the tokenizer can't be loaded.
    """
    document = load_document(path, overrides)
    spec = anchor_paths(document.value)
    if problems := find_data_problems(document.value.data):
        raise SpecError(f"the data of {spec.name} can't be used as it is", problems=document.place(problems))
    environment = load_environment(spec.resources.cluster)
    python = environment.python or sys.executable
    request = json.dumps({"spec": spec.to_values(), "rows": rows, "examples": examples}) + "\n"
    argv = (python, "-P", "-W", "ignore", "-m", "lora_jobs.training.preview")
    answered = run_command(argv, timeout=PREVIEW_SECONDS, input=request)
    try:
        values = json.loads(answered.stdout)
    except ValueError as error:
        said = (answered.stderr.strip().splitlines() or ["nothing"])[-1][:300]
        raise SpecError(
            f"the data can't be tokenized: {python} ended with status {answered.returncode} and said: {said}",
            hint="transformers and datasets have to be installed there: pip install 'lora-jobs[train]'",
        ) from error
    if "error" in values:
        raise SpecError(values["error"], hint=values["hint"])
    held_out = values["eval"]
    train, evaluation = _read_part(values["train"]), None if held_out is None else _read_part(held_out)
    return Preview(spec, train, evaluation, keep_lengths(spec, [train, *([evaluation] if evaluation else [])]))


def keep_lengths(spec: JobSpec, parts: Sequence[Part]) -> str | None:
    """Store what was counted for `check` and `plan`; in words why it can't be, None where it is."""
    try:
        for part in parts:
            if (key := find_key(spec, part.name)) is None:
                return "only the lengths of files, and of datasets of the hub, are kept for check and plan"
            record_lengths(find_runs_root(), key, RowLengths(part.lengths, part.more))
    except RunError as error:
        return f"the lengths can't be kept for check and plan: {error.message}"
    return None


def _read_part(values: dict[str, Any]) -> Part:
    examples = tuple(tuple(Piece(**piece) for piece in example) for example in values["examples"])
    return Part(**{**values, "examples": examples, "lengths": tuple(values["lengths"])})
