"""One line of a plan: a way to run the job, and what is known of it."""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from msgspec import Struct

if TYPE_CHECKING:
    from lora_jobs.sizing import Gpu, Verdict
    from lora_jobs.sizing.duration import Duration
    from lora_jobs.spec import JobSpec
    from lora_jobs.workflows.checking import CheckReport
    from lora_jobs.workflows.layouts import Layout


class PlanRow(Struct, frozen=True):
    """One way to run the job: what it asks for, whether it fits, when it would start and end."""

    layout: Layout
    spec: JobSpec
    report: CheckReport | None = None
    """As `check` would give it; None where the partition's GPU is not known."""
    duration: Duration | None = None
    jobs: int = 1
    """Jobs that it takes one after the other, where it lasts longer than the time limit."""
    expected_start: str | None = None
    start_note: str | None = None
    problems: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.layout.name

    @property
    def gpu(self) -> Gpu | None:
        return self.report.gpu if self.report else None

    @property
    def verdict(self) -> Verdict | None:
        return self.report.verdict if self.report else None

    @property
    def possible(self) -> bool:
        return not self.problems and self.verdict is not None and self.verdict.fits

    @property
    def expected_finish(self) -> str | None:
        """Start and duration; None where either is unknown. With several jobs, their waiting comes on top."""
        if self.expected_start is None or self.duration is None:
            return None
        start = datetime.fromisoformat(self.expected_start)
        return (start + timedelta(seconds=round(self.duration.seconds))).isoformat()

    @property
    def gpu_hours(self) -> float | None:
        return None if self.duration is None else self.duration.seconds * self.spec.resources.world_size / 3600

    def to_json(self) -> dict[str, Any]:
        asked, verdict, duration = self.spec.resources, self.verdict, self.duration
        return {
            "row": self.name,
            "partition": self.layout.partition,
            "qos": asked.qos,
            "nodes": asked.nodes,
            "gpus_per_node": asked.gpus_per_node,
            "world_size": asked.world_size,
            "gpu": self.gpu.name if self.gpu else None,
            "time": asked.time,
            "fits": verdict.fits if verdict else None,
            "peak_bytes": verdict.estimate.peak_bytes if verdict else None,
            "usable_bytes": self.gpu.usable_bytes if self.gpu else None,
            "expected_start": self.expected_start,
            "start_note": self.start_note,
            "duration_seconds": round(duration.seconds) if duration else None,
            "duration_parts": {name: round(part) for name, part in duration.components.items()} if duration else None,
            "steps": duration.steps if duration else None,
            "tokens_per_second": round(duration.tokens_per_second, 1) if duration else None,
            "speed": duration.basis if duration else None,
            "measured": duration.measured if duration else None,
            "jobs": self.jobs,
            "expected_finish": self.expected_finish,
            "gpu_hours": None if self.gpu_hours is None else round(self.gpu_hours, 2),
            "problems": list(self.problems),
            "set": dict(self.layout.settings),
        }


def order_rows(row: PlanRow) -> tuple[int, str, float, str]:
    """What ends first, to the minute, and of those the cheapest; then what fits without a known start, by duration;
    then what can't run.
    """
    seconds = row.duration.seconds if row.duration else math.inf
    if not row.possible:
        return 3, "", seconds, row.name
    if row.expected_finish is not None:
        return 0, row.expected_finish[:16], row.gpu_hours or 0.0, row.name
    return (1 if row.duration else 2), row.expected_start or "", seconds, row.name
