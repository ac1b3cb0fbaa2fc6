"""What a run really took beside what was predicted for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import asdict

from lora_jobs.runs import load_metrics
from lora_jobs.workflows.progress import load_prediction

if TYPE_CHECKING:
    from lora_jobs.runs import Run


class Measured(Struct, frozen=True):
    """One quantity of rank 0 at its highest, in bytes, and what the estimate said of it; None where it says nothing."""

    name: str
    bytes: int
    predicted_bytes: int | None

    @property
    def difference(self) -> float | None:
        """Share by which the measured value is above the predicted one."""
        return self.bytes / self.predicted_bytes - 1 if self.predicted_bytes else None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "difference": None if self.difference is None else round(self.difference, 4)}


def compare_memory(run: Run) -> tuple[Measured, ...]:
    """On a GPU: allocated, reserved, and the device's used bytes against what must fit. On a CPU: the process.

    Nothing where nothing was measured yet. Raises RunError.
    """
    rows, predicted = load_metrics(run), load_prediction(run)
    highest = {
        name: max((value for row in rows if isinstance(value := row.get(f"{name}_bytes"), int)), default=0)
        for name in ("memory_allocated", "memory_reserved", "memory_device_used", "host_memory")
    }
    if highest["memory_allocated"]:
        found = [
            Measured("allocated", highest["memory_allocated"], predicted.allocated_peak_bytes),
            Measured("reserved", highest["memory_reserved"], None),
            Measured("device_used", highest["memory_device_used"], predicted.peak_bytes),
        ]
    else:
        found = [Measured("host", highest["host_memory"], predicted.peak_bytes)]
    return tuple(measured for measured in found if measured.bytes)
