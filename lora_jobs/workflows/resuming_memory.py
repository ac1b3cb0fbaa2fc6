"""After the GPU ran out of memory: what the estimator would change, of all that a resumed run may change."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

from lora_jobs.checkpoints import find_drift
from lora_jobs.sizing.suggestions import find_smallest_set, list_trials, try_as_is
from lora_jobs.units import format_gib

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_jobs.sizing.suggestions import Trial
    from lora_jobs.spec import JobSpec
    from lora_jobs.workflows.checking import CheckReport

LOWER = 0.9
"""The estimate said that it fits, and it did not: a change has to take a tenth off, or it may end the same way."""


class MemoryAdvice(Struct, frozen=True):
    """Options of `resume` that need less memory, and the peak by the estimate as it is and with them."""

    options: tuple[str, ...]
    present_bytes: int
    peak_bytes: int
    why: str

    def __str__(self) -> str:
        peaks = f"{format_gib(self.peak_bytes)} instead of {format_gib(self.present_bytes)} by the estimate"
        return f"{' '.join(self.options)} ({peaks}: {self.why})"


def advise_memory(report: CheckReport) -> MemoryAdvice | None:
    """The fewest changes, the cheapest of them, that take a tenth off the peak.

    None where the closed form does not know the model, or no such changes go with the checkpoint.
    """
    if not report.is_estimated:
        return None
    spec, present = report.spec, report.verdict.estimate.peak_bytes
    gpu = replace(report.gpu, usable_bytes=int(LOWER * min(present, report.gpu.usable_bytes)))
    base = try_as_is(spec, gpu, report.verdict.estimate)
    trials = [trial for trial in list_trials(spec, gpu) if trial.peak_bytes < present and _is_resumable(spec, trial)]
    found = find_smallest_set(base, trials)
    if found is None:
        return None
    return MemoryAdvice(_list_options(spec, found.spec, found.settings), present, found.peak_bytes, found.why)


def _is_resumable(spec: JobSpec, trial: Trial) -> bool:
    return all(change.kind != "forbidden" for change in find_drift(spec, trial.spec))


def _list_options(spec: JobSpec, changed: JobSpec, settings: Mapping[str, Any]) -> tuple[str, ...]:
    asking = [change.key for change in find_drift(spec, changed) if change.kind == "allowed_with_flag"]
    return (
        *(f"--set {key}={json.dumps(value)}" for key, value in settings.items()),
        *(f"--allow-drift {key}" for key in asking),
    )
