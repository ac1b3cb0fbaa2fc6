"""How far a run has come, from what it wrote: the tail of its metrics, and what was estimated at submission."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from lora_jobs.runs import latest_metrics
from lora_jobs.units import parse_duration

if TYPE_CHECKING:
    from lora_jobs.runs import Attempt, Run

# Of a run's metrics, which may be millions of steps without an evaluation among them: some thousand steps.
MOST_BYTES = 1 << 20
_TIME_OPTION = re.compile(r"^#SBATCH --time=(\S+)$", re.MULTILINE)


class Progress(Struct, frozen=True):
    """The newest numbers of a training; None where nothing was written. Memory: highest so far, of rank 0."""

    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    eval_loss: float | None = None
    tokens_per_second: float | None = None
    memory_peak_bytes: int | None = None
    predicted_bytes: int | None = None
    seconds_left: float | None = None
    written_at: float | None = None


class Prediction(Struct, frozen=True):
    """What estimate.json says: bytes that torch would report, bytes that must fit, GPUs in all."""

    allocated_peak_bytes: int | None = None
    peak_bytes: int | None = None
    world_size: int | None = None


def load_prediction(run: Run) -> Prediction:
    """The estimate that the run was submitted with; nothing where the file is missing or not ours."""
    try:
        stored = json.loads(run.estimate_path.read_text(encoding="utf-8"))
        estimate = stored.get("estimate", {})
        return Prediction(estimate.get("allocated_peak_bytes"), estimate.get("peak_bytes"), stored.get("world_size"))
    except (OSError, ValueError, AttributeError):
        return Prediction()


def load_limit(run: Run) -> int | None:
    """Seconds of the script's time limit."""
    try:
        match = _TIME_OPTION.search(run.script_path.read_text(encoding="utf-8"))
        return parse_duration(match[1]) if match else None
    except (OSError, ValueError):
        return None


def read_progress(run: Run, attempt: Attempt | None) -> Progress:
    """The newest numbers; the seconds left follow from the pace of this attempt. Reads the end of the metrics only."""
    row = latest_metrics(run, "train", most_bytes=MOST_BYTES) or {}
    evaluated = latest_metrics(run, "eval", most_bytes=MOST_BYTES) or {}
    predicted = load_prediction(run)
    allocated = row.get("memory_allocated_bytes")
    return Progress(
        step=row.get("step"),
        total_steps=row.get("max_steps") or evaluated.get("max_steps"),
        loss=row.get("loss"),
        eval_loss=evaluated.get("eval_loss"),
        tokens_per_second=row.get("tokens_per_second"),
        memory_peak_bytes=allocated or row.get("host_memory_bytes"),
        predicted_bytes=predicted.allocated_peak_bytes if allocated else predicted.peak_bytes,
        seconds_left=_estimate_rest(row, attempt),
        written_at=row.get("time"),
    )


def _estimate_rest(row: dict[str, Any], attempt: Attempt | None) -> float | None:
    """Seconds from the newest row to the last step, at the mean pace of this attempt (its start-up included)."""
    step, total, written = row.get("step"), row.get("max_steps"), row.get("time")
    if attempt is None or not step or not total or not written or row.get("attempt", attempt.number) != attempt.number:
        return None
    done = step - attempt.first_step
    if done <= 0:
        return None
    return float(max(0.0, (total - step) * (written - attempt.started_at) / done))
