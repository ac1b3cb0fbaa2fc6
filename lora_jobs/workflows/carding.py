"""The model card of a run, from its records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_jobs.rendering.card import Card, render_card
from lora_jobs.runs import load_metrics
from lora_jobs.spec import load_spec, render_spec
from lora_jobs.workflows.report_curves import format_number, is_number
from lora_jobs.workflows.report_origin import describe_origin, load_place, read_part

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_jobs.checkpoints import Manifest
    from lora_jobs.runs import Run

LOCAL_FACTS = frozenset({"Host", "Python", "Libraries", "Run directory"})


def describe_model(run: Run, manifest: Manifest, *, merged: bool) -> str:
    """README.md: base model, data with its fingerprint, results beside what was expected, spec, versions."""
    spec, rows = load_spec(run.spec_path), load_metrics(run)
    base, quantized = spec.model.name_or_path, spec.model.quantization is not None
    facts = [row for row in describe_origin(run, spec, load_place(run)) if row[0] not in LOCAL_FACTS]
    facts.append(("Steps", str(manifest.step)))
    if quantized:
        facts.append(("Trained over", "a quantized base" + (", merged into the unquantized weights" if merged else "")))
    sample: dict[str, Any] = next((row for row in reversed(rows) if row.get("kind") == "sample"), {})
    shown = {"Wanted": "expected", "Without the adapter": "without_adapter", "With it": "with_adapter"}
    versions = read_part(manifest.metadata, "versions")
    return render_card(
        Card(
            title=run.name,
            merged=merged,
            base_model=base,
            is_on_hub=not Path(base).is_absolute() and base.count("/") == 1,
            datasets=(spec.data.dataset,) if spec.data.dataset and not spec.data.names_dataset_directory() else (),
            facts=tuple(facts),
            results=tuple(list_results(rows)),
            sample=tuple((name, str(sample[key])) for name, key in shown.items() if sample.get(key)),
            spec=render_spec(spec),
            versions=tuple(f"{name} {version}" for name, version in versions.items()),
        )
    )


def list_results(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """(metric, before, after, expected) of what was measured on held-out examples."""
    phases = {row.get("phase"): row for row in rows if row.get("kind") == "eval"}
    final: dict[str, Any] = next((row for row in reversed(rows) if row.get("kind") == "final"), {})
    reached, targets = read_part(final, "metrics"), read_part(final, "targets")
    before, after = (phases.get(phase, {}) for phase in ("before", "after"))
    found: list[tuple[str, str, str, str]] = []
    for name in dict.fromkeys(["eval_loss", "perplexity", *reached]):
        now = after.get(name, reached.get(name))
        if is_number(now):
            expected = read_part(targets, name).get("expected")
            found.append((name.replace("_", " "), show(before.get(name)), show(now), show(expected)))
    return found


def show(value: object) -> str:
    """A number, or nothing."""
    return format_number(value) if is_number(value) else ""
