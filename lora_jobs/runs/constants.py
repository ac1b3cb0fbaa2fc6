"""What runs taught about a GPU type, beside any model: its CUDA context, NCCL's buffers, the allocator's overhead.

One line a run in <runs>/constants.jsonl. Constants only: nothing here depends on a model, and no estimate is fitted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import asdict

from lora_jobs.runs.durable import append_line, load_lines
from lora_jobs.runs.records import read_record

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

CONSTANTS = "constants.jsonl"

FEWEST_RUNS = 3
"""Runs on one GPU type before a smaller allocator overhead than the published worst is believed."""


class Observation(Struct, frozen=True):
    """One run on one GPU type: bytes that the device lent outside torch's allocator, and reserved over allocated."""

    gpu: str
    world_size: int
    outside_bytes: int
    reserved_ratio: float

    @property
    def plausible(self) -> bool:
        return self.world_size > 0 and self.outside_bytes > 0 and self.reserved_ratio >= 1


class Constants(Struct, frozen=True):
    """What is known of one GPU type; None where no run could tell."""

    runs: int
    context_bytes: int | None = None
    nccl_bytes: int | None = None
    allocator_worst: float | None = None
    """Share of the allocated peak that was reserved on top of it, at the most."""


def observe_memory(rows: Iterable[Mapping[str, Any]], *, gpu: str, world_size: int) -> Observation | None:
    """From the rows of one run's metrics; None without a GPU's rows.

    The device's used bytes less the reserved ones at the same moment (the median: kernels are loaded in the first
    steps), and the highest reserved over the highest allocated.
    """
    wanted = ("allocated", "reserved", "reserved_now", "device_used")
    measured = [[row.get(f"memory_{name}_bytes") for name in wanted] for row in rows]
    whole = [found for row in measured if len(found := [v for v in row if isinstance(v, int) and v > 0]) == len(wanted)]
    outside = [used - held for _, _, held, used in whole]
    from statistics import median  # here: it takes longer to load than a look at the queue may take

    if not outside or median(outside) <= 0:
        return None
    highest = [max(values[place] for values in whole) for place in (0, 1)]
    return Observation(gpu, world_size, round(median(outside)), round(highest[1] / highest[0], 4))


def record_constants(root: Path, run_id: str, observation: Observation) -> None:
    """Adds a line. Raises RunError."""
    append_line(root / CONSTANTS, {"run": run_id, **asdict(observation)})


def load_constants(root: Path) -> dict[str, Constants]:
    """By GPU name; the last line of a run counts. Lines that are not ours are left out. Raises RunError."""
    latest = {
        str(line.get("run")): observation
        for line in load_lines(root / CONSTANTS)
        if (observation := read_record(Observation, line)) and observation.plausible
    }
    names = {observation.gpu for observation in latest.values()}
    return {name: combine_observations([o for o in latest.values() if o.gpu == name]) for name in names}


def combine_observations(observations: Sequence[Observation]) -> Constants:
    """Context: the median of runs on one GPU. NCCL: what runs on several need beyond it. Allocator: the worst seen."""
    alone = [o.outside_bytes for o in observations if o.world_size == 1]
    several = [o.outside_bytes for o in observations if o.world_size > 1]
    from statistics import median

    context = round(median(alone)) if alone else None
    nccl = max(0, round(median(several)) - context) if several and context is not None else None
    return Constants(len(observations), context, nccl, max(o.reserved_ratio for o in observations) - 1)
