"""What a finished run came to: losses before and after, a sample, final metrics beside their targets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import Struct

from lora_jobs.errors import LoraJobsError
from lora_jobs.runs import latest_metrics, load_metrics

if TYPE_CHECKING:
    from lora_jobs.runs import Run


class Result(Struct, frozen=True):
    """A metric of the finished adapter beside its target; None where it has none, or is not measured yet."""

    name: str
    reached: float | None
    expected: float | None
    met: bool | None


class Outcome(Struct, frozen=True):
    """What a run's training came to: held-out loss before and after it, a sample answered with and without, results."""

    losses: tuple[float | None, float | None] | None
    sample: dict[str, Any] | None
    results: tuple[Result, ...] = ()


def load_outcome(run: Run) -> Outcome:
    """The outcome by the run's metrics; None for what was not measured."""
    metrics = load_metrics(run)
    losses = {row.get("phase"): row["eval_loss"] for row in metrics if row.get("kind") == "eval"}
    measured = (losses["before"], losses["after"]) if {"before", "after"} <= set(losses) else None
    sample = next((row for row in reversed(metrics) if row.get("kind") == "sample"), None)
    return Outcome(measured, sample, load_results(run))


def load_results(run: Run) -> tuple[Result, ...]:
    """Final metrics and targets: those that the finished run recorded, before that what its spec expects."""
    row = latest_metrics(run, "final")
    if row is None:
        stored = run.spec_path.read_text(encoding="utf-8", errors="replace") if run.spec_path.is_file() else ""
        if "targets:" not in stored or "\n  targets: {}\n" in stored:  # as most: a page need not load what reads specs
            return ()
        from lora_jobs.spec import load_spec

        try:
            wanted = dict(load_spec(run.spec_path).training.targets)
        except LoraJobsError:  # of another version: the page shows everything else
            wanted = {}
        return tuple(Result(name, None, target, None) for name, target in wanted.items())
    metrics, targets = _mapping(row.get("metrics")), _mapping(row.get("targets"))
    found = []
    for name in dict.fromkeys([*metrics, *targets]):
        target = _mapping(targets.get(name))
        reached, expected = _number(metrics.get(name)), _number(target.get("expected"))
        if reached is not None or expected is not None:
            found.append(Result(name, reached, expected, target.get("met") is True if expected is not None else None))
    return tuple(found)


def _mapping(value: object) -> dict[str, Any]:
    """What is no mapping, in a damaged record, holds nothing."""
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
