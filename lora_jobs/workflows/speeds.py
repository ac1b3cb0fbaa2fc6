"""How fast the user's own earlier runs of a model were, by GPU type."""

from __future__ import annotations

import json
from statistics import median
from typing import TYPE_CHECKING

from msgspec import Struct

from lora_jobs.errors import LoraJobsError
from lora_jobs.runs import Run, list_runs, load_metrics
from lora_jobs.sizing.duration import NODE_SPEED
from lora_jobs.spec import JobSpec, parse_spec

if TYPE_CHECKING:
    from pathlib import Path

MOST_RUNS = 20
"""The newest runs that are looked at."""


class Measured(Struct, frozen=True):
    """Tokens per second of one GPU alone, without padding, and the runs that it was measured in."""

    tokens_per_second: float
    runs: str


def measure_speeds(spec: JobSpec, root: Path, notes: list[str]) -> dict[str, Measured]:
    """By GPU name, the median speed of earlier runs of the same model in the same precision, newest first."""
    found: dict[str, list[tuple[float, str]]] = {}
    try:
        runs = list_runs(root)
    except LoraJobsError as error:
        notes.append(f"earlier runs not readable: {error.message}")
        return {}
    for run in runs[:MOST_RUNS]:
        if (measured := _measure_run(run, spec)) is not None:
            gpu, speed = measured
            found.setdefault(gpu, []).append((speed, run.id))
    return {
        gpu: Measured(median(speed for speed, _ in speeds), _name_runs([run_id for _, run_id in speeds]))
        for gpu, speeds in found.items()
    }


def _measure_run(run: Run, spec: JobSpec) -> tuple[str, float] | None:
    """GPU and tokens/s of one of its GPUs; None for another model, or where nothing was measured."""
    try:
        past = parse_spec(run.spec_path.read_text(encoding="utf-8"), source=str(run.spec_path))
        if _key(past) != _key(spec):
            return None
        gpu = json.loads(run.estimate_path.read_text(encoding="utf-8"))["gpu"]["name"]
        rows = load_metrics(run)
    except (OSError, LoraJobsError, ValueError, KeyError, TypeError):
        return None
    # The first step of each attempt warms up: kernels are compiled, caches filled.
    first: dict[object, object] = {}
    for row in rows:
        if row.get("kind") == "train":
            first.setdefault(row.get("attempt"), row.get("step"))
    speeds = [
        float(row["tokens_per_second"])
        for row in rows
        if row.get("kind") == "train"
        and isinstance(row.get("tokens_per_second"), int | float)
        and row["tokens_per_second"] > 0
        and row.get("step") != first.get(row.get("attempt"))
    ]
    if not speeds or not isinstance(gpu, str):
        return None
    world = past.resources.world_size
    alone = world * (NODE_SPEED[past.resources.nodes > 1] if world > 1 else 1.0)
    return gpu, median(speeds) / alone


def _key(spec: JobSpec) -> tuple[object, ...]:
    """What must be the same for a speed to carry over."""
    training = spec.training
    half = training.bf16 or training.fp16
    return (
        spec.model.name_or_path,
        spec.model.dtype,
        spec.model.quantization is None,
        half,
        training.activation_checkpointing,
    )


def _name_runs(ids: list[str]) -> str:
    return ids[0] if len(ids) == 1 else f"{ids[0]} and {len(ids) - 1} more"
