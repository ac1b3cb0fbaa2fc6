"""The priority of a job by its factors: how much each gives, what it could give, and what changes it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from msgspec import Struct

from lora_jobs.units import parse_duration

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_jobs.cluster.parsers import Factors


class FactorRow(Struct, frozen=True):
    """One factor of multifactor: the points that it gives, its weight (the most it can give), what changes it."""

    name: str
    points: int
    weight: int | None
    changes: str


_WEIGHTS = re.compile(r"\d+|[^=,]+=-?\d+(\.\d+)?(,[^=,]+=-?\d+(\.\d+)?)*")
# Field of Factors, name, the weight's key in slurm.conf, what changes it. Source: Slurm's priority_multifactor page.
_FACTORS = (
    ("age", "age", "PriorityWeightAge", "grows while the job is eligible and waits, up to its weight after {max_age}"),
    (
        "fairshare",
        "fair-share",
        "PriorityWeightFairShare",
        "falls with what you and your account used lately, and recovers (half of it forgotten in {half_life})",
    ),
    ("association", "association", "PriorityWeightAssoc", "what the site gives your account"),
    ("job_size", "size", "PriorityWeightJobSize", "{size} jobs get more"),
    ("partition", "partition", "PriorityWeightPartition", "resources.partition"),
    ("qos", "QOS", "PriorityWeightQOS", "resources.qos"),
    ("tres", "TRES", "PriorityWeightTRES", "what the job asks for{tres}"),
    ("site", "site", "", "set by the site"),
    ("nice", "nice", "", "--nice lowers it; `scontrol update JobId=JOBID Nice=0` takes that back"),
)


def list_factors(factors: Factors | None, config: Mapping[str, str]) -> tuple[FactorRow, ...]:
    """A row for each factor that counts here: it has a weight, or gives points. Nice is taken away from the sum."""
    if factors is None:
        return ()
    tres = config.get("PriorityWeightTRES", "")
    words = {
        "max_age": _say_days(config.get("PriorityMaxAge", "")),
        "half_life": _say_days(config.get("PriorityDecayHalfLife", "")),
        "tres": "" if tres in ("", "(null)") else f": {tres.replace(',', ', ')}",
        "size": "smaller" if config.get("PriorityFavorSmall", "No").lower() == "yes" else "larger",
    }
    rows = []
    for field, name, key, changes in _FACTORS:
        points = -factors.nice if field == "nice" else getattr(factors, field)
        weight = find_weight(config.get(key, ""))
        if points or weight:
            rows.append(FactorRow(name, points, weight, changes.format(**words)))
    return tuple(rows)


def find_weight(text: str) -> int | None:
    """The most that a factor gives: a number, or of "cpu=1000,gres/gpu=2000" the sum of what can be given."""
    weights = [part.rpartition("=")[2] for part in text.split(",")]
    return int(sum(max(0.0, float(weight)) for weight in weights)) if _WEIGHTS.fullmatch(text) else None


def _say_days(text: str) -> str:
    """A duration of slurm.conf in days, such as "7 days"."""
    try:
        return f"{parse_duration(text) / 86400:g} days"
    except ValueError:
        return "some days"
