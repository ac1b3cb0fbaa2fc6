"""How long a job takes: its rows as tokens, the speed of earlier runs, and how many jobs its time limit makes of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_jobs.sizing.duration import Rows, measure_rows
from lora_jobs.spec import iterate_rows
from lora_jobs.units import parse_duration

if TYPE_CHECKING:
    from lora_jobs.sizing.duration import Duration
    from lora_jobs.spec import JobSpec


def load_rows(spec: JobSpec) -> tuple[Rows | None, Rows | None]:
    """Token counts of the training and evaluation rows; None where the file is not here or has no usable row."""
    return _measure_file(spec, spec.data.train), _measure_file(spec, spec.data.eval)


def count_jobs(spec: JobSpec, duration: Duration) -> int | None:
    """Jobs one after the other, each with its own start; None where the time limit leaves no time to train."""
    start = duration.components["start"]
    room = parse_duration(spec.resources.time) - spec.resume.signal_seconds - start
    if room <= 0:
        return None
    return math.ceil((duration.seconds - start) / room) if duration.seconds > room + start else 1


def _measure_file(spec: JobSpec, name: str | None) -> Rows | None:
    if name is None or spec.data.dataset is not None or not Path(name).is_file():
        return None
    extra = len(spec.data.instruction or "") if spec.data.format == "svg_caption" else 0
    return measure_rows([_count_text(row) + extra for row in iterate_rows(Path(name))], spec.data.max_length)


def _count_text(value: Any) -> int:
    """Characters of every text in a row: rows hold little beside what is trained on."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_count_text(part) for key, part in value.items() if key != "role")
    return sum(_count_text(part) for part in value) if isinstance(value, list) else 0
