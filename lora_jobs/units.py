"""Numbers as people read and write them: bytes, counts, durations."""

from __future__ import annotations

import re

GIB = 1024**3
MIB = 1024**2

_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[KMGT]?)(?:i?B)?", re.IGNORECASE | re.ASCII)
_DURATION = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes of a Slurm size such as "494000M" or "64G"; a bare number is MiB, as sbatch's --mem has it."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"not a size: {text!r} (wanted a number with K, M, G or T, such as 64G)")
    power = "KMGT".index(match["unit"].upper() or "M") + 1
    return int(float(match["number"]) * 1024**power)


def parse_duration(text: str) -> int:
    """Seconds of a Slurm time: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Source: sbatch(1), --time."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"not a time: {text!r} (wanted [days-]hours:minutes:seconds, such as 24:00:00)")
    parts = [int(part) for part in match["clock"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = parts + [0] * (3 - len(parts))
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return ((int(match["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def format_duration(seconds: float) -> str:
    """A duration as Slurm writes it: "1-02:03:04", "02:03:04"."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{hour:02}:{minute:02}:{second:02}"
    return f"{days}-{clock}" if days else clock


def format_gib(number: float) -> str:
    """Bytes as "12.3 GiB"; below 0.1 GiB as MiB."""
    if abs(number) < GIB / 10:
        return f"{number / MIB:.1f} MiB"
    return f"{number / GIB:.1f} GiB"


def format_count(number: int) -> str:
    """9241705984 as "9,241,705,984"."""
    return f"{number:,}"
