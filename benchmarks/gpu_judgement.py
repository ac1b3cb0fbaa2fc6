"""What `make bench-gpu` makes of its rows: how far the closed form is off, and whether it ever says "fits" wrongly."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lora_jobs.spec import JobSpec

MEDIAN_PERCENT = 2.0
WORST_PERCENT = 5.0
"""Of allocated bytes, in training and in evaluation."""

PHASES = ("train", "evaluation")


def find_reason_to_skip(spec: JobSpec, installed: Iterable[str]) -> str | None:
    """Why a row cannot be measured with these packages; None where it can."""
    needed = {
        "bitsandbytes": spec.model.quantization is not None,
        "flash_attn": spec.model.attn_implementation == "flash_attention_2",
        "deepspeed": spec.deepspeed is not None,
    }
    missing = [name for name, is_needed in needed.items() if is_needed and name not in installed]
    return f"{', '.join(missing)} not installed" if missing else None


def is_measured(row: Mapping[str, Any]) -> bool:
    """Whether a row has figures; else it tells why in `skipped` or `error`."""
    return not ({"skipped", "error"} & row.keys())


def judge(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Median and worst error of allocated bytes, and the false "fits": rows whose process used more of the device than
    the estimate asks for where it says "fits", so that a card between the two would be said to do and does not.

    `good` is whether all limits are kept; nothing measured is not good.
    """
    measured = {name: row for name, row in rows.items() if is_measured(row)}
    errors = {
        f"{name}, {phase}": 100 * (row[f"predicted_{phase}_bytes"] / row[f"{phase}_allocated_bytes"] - 1)
        for name, row in measured.items()
        for phase in PHASES
    }
    false_fits = [
        name
        for name, row in measured.items()
        if max(row[f"{phase}_device_used_bytes"] for phase in PHASES) > row["predicted_fits_bytes"]
    ]
    counts = {
        "measured": len(measured),
        "skipped": sum("skipped" in row for row in rows.values()),
        "failed": sum("error" in row for row in rows.values()),
    }
    if not errors:
        return {**counts, "good": False}
    median = statistics.median(map(abs, errors.values()))
    worst = max(errors, key=lambda name: abs(errors[name]))
    return {
        **counts,
        "median_percent": round(median, 3),
        "worst_percent": round(abs(errors[worst]), 3),
        "worst_row": worst,
        "false_fits": false_fits,
        "good": median <= MEDIAN_PERCENT and abs(errors[worst]) <= WORST_PERCENT and not false_fits,
    }
