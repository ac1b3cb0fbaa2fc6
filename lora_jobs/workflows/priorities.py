"""The priority of a job by its factors: how much each gives, what it could give, and what changes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_jobs.units import parse_duration

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_jobs.cluster.parsers import Factors


@dataclass(frozen=True, slots=True)
class FactorRow:
    """One factor of multifactor: the points that it gives, its weight (the most it can give), what changes it."""

    name: str
    points: int
    weight: int | None
    changes: str


# Field of Factors, name, the weight's key in slurm.conf, what changes it. Source: Slurm's priority_multifactor page.
_FACTORS = (
    ("age", "age", "PriorityWeightAge", "grows while the job is eligible and waits, up to its weight after {max_age}"),
    (
        "fairshare",
        "fair-share",
        "PriorityWeightFairShare",
        "falls with what you and your account used lately, and recovers (half of it forgotten in {half_life})",
    ),
    ("job_size", "size", "PriorityWeightJobSize", "{size} jobs get more"),
    ("partition", "partition", "PriorityWeightPartition", "resources.partition"),
    ("qos", "QOS", "PriorityWeightQOS", "resources.qos"),
    ("tres", "TRES", "PriorityWeightTRES", "what the job asks for, per kind of resource"),
    ("site", "site", "", "set by the site"),
    ("nice", "nice", "", "--nice lowers it; `scontrol update JobId=JOBID Nice=0` takes that back"),
)


def list_factors(factors: Factors | None, config: Mapping[str, str]) -> tuple[FactorRow, ...]:
    """A row for each factor that counts here: it has a weight, or gives points. Nice is taken away from the sum."""
    if factors is None:
        return ()
    words = {
        "max_age": _say_days(config.get("PriorityMaxAge", "")),
        "half_life": _say_days(config.get("PriorityDecayHalfLife", "")),
        "size": "smaller" if config.get("PriorityFavorSmall", "No").lower() == "yes" else "larger",
    }
    rows = []
    for field, name, key, changes in _FACTORS:
        points = -factors.nice if field == "nice" else getattr(factors, field)
        text = config.get(key, "")
        weight = int(text) if text.isdecimal() else None
        if points or weight:
            rows.append(FactorRow(name, points, weight, changes.format(**words)))
    return tuple(rows)


def _say_days(text: str) -> str:
    """A duration of slurm.conf in days, such as "7 days"."""
    try:
        return f"{parse_duration(text) / 86400:g} days"
    except ValueError:
        return "some days"
