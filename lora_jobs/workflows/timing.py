"""How many jobs a time limit makes of a duration."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lora_jobs.units import parse_duration

if TYPE_CHECKING:
    from lora_jobs.sizing.duration import Duration
    from lora_jobs.spec import JobSpec


def count_jobs(spec: JobSpec, duration: Duration) -> int | None:
    """Jobs one after the other, each with its own start; None where the time limit leaves no time to train."""
    start = duration.components["start"]
    room = parse_duration(spec.resources.time) - spec.resume.signal_seconds - start
    if room <= 0:
        return None
    return math.ceil((duration.seconds - start) / room) if duration.seconds > room + start else 1
