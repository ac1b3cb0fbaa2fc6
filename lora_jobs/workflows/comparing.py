"""Runs side by side, best first: what each came to, and what it cost."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import asdict

from lora_jobs.errors import LoraJobsError, RunError, RunNotFoundError, SpecError
from lora_jobs.runs import (
    Run,
    find_own_sweep,
    find_run,
    find_runs_root,
    find_sweep,
    list_runs,
    load_attempts,
    load_metrics,
)
from lora_jobs.spec import load_spec, show_variant
from lora_jobs.workflows.observing import observe_runs
from lora_jobs.workflows.progress import load_prediction

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lora_jobs.workflows.observing import RunStatus

LARGER_IS_BETTER = frozenset({"tokens_per_second"})
FIELDS = {
    "eval_loss": "best_eval_loss",
    "final_eval_loss": "final_eval_loss",
    "loss": "loss",
    "tokens_per_second": "tokens_per_second",
    "memory": "memory_peak_bytes",
    "gpu_hours": "gpu_hours",
}
# Differences between specs that say nothing about what was tried.
_NOT_SHOWN = ("name", "sweep", "resume", "resources")


class Curve(Struct, frozen=True):
    """Losses by step: of training (step, loss), and held out."""

    train: tuple[tuple[int, float], ...]
    evaluated: tuple[tuple[int, float], ...]


class ComparedRun(Struct, frozen=True):
    """One run: what makes it different, what it came to (None where not known), what it cost.

    Held-out losses are those of after a step was trained: the base model's is no result of the run. `loss` is the mean
    of the last tenth of the training steps. `memory_peak_bytes` is what was allocated, `predicted_bytes` the estimate
    of the same.
    """

    run: str
    directory: str
    values: Mapping[str, Any]
    state: str
    step: int | None
    best_eval_loss: float | None
    final_eval_loss: float | None
    loss: float | None
    tokens_per_second: float | None
    memory_peak_bytes: int | None
    predicted_bytes: int | None
    gpu_hours: float | None
    curve: Curve

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "curve"}


class Comparison(Struct, frozen=True):
    """The runs, best first; those without a number for `by` stand last."""

    by: str
    keys: tuple[str, ...]
    runs: tuple[ComparedRun, ...]
    notes: tuple[str, ...] = ()
    sweep: str | None = None
    """The sweep that all runs are tasks of."""

    def find_number(self, run: ComparedRun) -> float | None:
        """What the run is ranked by."""
        number: float | None = getattr(run, FIELDS[self.by])
        return number

    def to_json(self) -> dict[str, Any]:
        return {
            "by": self.by,
            "sweep": self.sweep,
            "keys": list(self.keys),
            "runs": [{"rank": rank, **run.to_json()} for rank, run in enumerate(self.runs, 1)],
            "notes": list(self.notes),
        }


def compare_runs(names: Sequence[str], *, by: str | None = None) -> Comparison:
    """Every run that the names mean, ranked. Slurm is asked once for the states of all.

    Errors: RunNotFoundError when a name means no run.
    """
    root = find_runs_root()
    runs = list(dict.fromkeys(run for name in names for run in list_named_runs(name, root)))
    values, damaged = find_differences(runs)
    report = observe_runs(runs, ranked=False)
    statuses = {status.directory: status for status in report.runs}
    found = []
    for run in runs:
        try:
            found.append(_compare_run(run, values[run], statuses[str(run.directory)]))
        except RunError as error:
            damaged.append(f"{run.id} can't be read: {error.message}")
    notes = list(dict.fromkeys([*report.notes, *damaged]))
    if by is None:
        by = "eval_loss" if any(run.best_eval_loss is not None for run in found) else "loss"
        if by == "loss":
            notes.append("no run has a held-out loss yet (data.eval): ranked by the training loss")
    keys = tuple(dict.fromkeys(key for run in runs for key in values[run]))
    return Comparison(by, keys, _rank(found, by), tuple(notes), _name_sweep(runs))


def _name_sweep(runs: Sequence[Run]) -> str | None:
    sweep = find_own_sweep(runs[0]) if len({run.directory.parent for run in runs}) == 1 else None
    return sweep.name if sweep else None


def list_named_runs(name: str, root: Path) -> list[Run]:
    """The runs of a sweep, of a spec's name, or the one run that the name means. Errors: RunNotFoundError."""
    if (sweep := find_sweep(name, root)) is not None:
        return sweep.runs
    runs = list_runs(root)
    named = [run for run in runs if run.id != run.name == name]
    if named and not any(run.id == name for run in runs):
        return named[::-1]
    try:
        return [find_run(name, root)]
    except RunNotFoundError as error:
        raise RunNotFoundError(error.message, hint="lora-jobs status --all lists runs and sweeps") from error


def find_differences(runs: Sequence[Run]) -> tuple[dict[Run, dict[str, Any]], list[str]]:
    """By run, the swept values; where the runs are not of one sweep, the keys in which their specs differ."""
    sweeps = {run.directory.parent: find_own_sweep(run) for run in {run.directory.parent: run for run in runs}.values()}
    only = next(iter(sweeps.values())) if len(sweeps) == 1 else None
    if only is not None:
        return {run: dict(only.find_values(run)) for run in runs}, []
    specs: dict[Run, dict[str, Any]] = {}
    notes = []
    for run in runs:
        try:
            specs[run] = flatten(load_spec(run.spec_path).to_values())
        except (LoraJobsError, OSError) as error:
            notes.append(f"{run.id}: its spec can't be read: {error}")
            specs[run] = {}
    readable = [spec for spec in specs.values() if spec]
    keys = dict.fromkeys(key for spec in readable for key in spec)
    different = [key for key in keys if len({repr(spec.get(key)) for spec in readable}) > 1]
    return {run: {key: spec[key] for key in different if key in spec} for run, spec in specs.items()}, notes


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Sections as dotted keys, without those that say nothing about what is learned."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if not prefix and key in _NOT_SHOWN:
            continue
        if isinstance(value, dict):
            found.update(flatten(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def _compare_run(run: Run, values: Mapping[str, Any], status: RunStatus) -> ComparedRun:
    curve, speeds, peak = read_measures(load_metrics(run))
    losses = [loss for _, loss in curve.evaluated]
    train = [loss for _, loss in curve.train]
    tail = train[-max(1, len(train) // 10) :]
    return ComparedRun(
        run=run.id,
        directory=str(run.directory),
        values=values,
        state=status.state,
        step=status.step,
        best_eval_loss=min(losses, default=None),
        final_eval_loss=losses[-1] if losses else None,
        loss=round(statistics.fmean(tail), 6) if tail else None,
        tokens_per_second=round(statistics.median(speeds), 1) if speeds else None,
        memory_peak_bytes=peak or status.memory_peak_bytes,
        predicted_bytes=status.predicted_bytes,
        gpu_hours=_count_gpu_hours(run, active=status.active),
        curve=curve,
    )


def read_measures(rows: Sequence[Mapping[str, Any]]) -> tuple[Curve, list[float], int | None]:
    """Losses by step, tokens/s of every step, and the highest allocated memory. Of a step trained twice the later."""
    train, evaluated, speeds, peaks = {}, {}, [], []
    for row in rows:
        step = row.get("step")
        if row.get("kind") == "train" and isinstance(step, int):
            if isinstance(row.get("loss"), int | float):
                train[step] = float(row["loss"])
            speeds += [float(row["tokens_per_second"])] if row.get("tokens_per_second") else []
            peaks += [int(row["memory_allocated_bytes"])] if row.get("memory_allocated_bytes") else []
        elif (
            row.get("kind") == "eval" and row.get("phase") != "before" and isinstance(row.get("eval_loss"), int | float)
        ):
            evaluated[int(step or 0)] = float(row["eval_loss"])
    curve = Curve(tuple(sorted(train.items())), tuple(sorted(evaluated.items())))
    return curve, speeds, max(peaks, default=None)


def _count_gpu_hours(run: Run, *, active: bool) -> float | None:
    """Hours of every attempt times its processes; one without an end counts only while the run is active."""
    last = load_prediction(run).world_size
    attempts = load_attempts(run)
    if not attempts or not last:
        return None
    now = time.time()
    ends = [attempt.ended_at or (now if active else attempt.started_at) for attempt in attempts]
    spans = [(end - each.started_at) * (each.world_size or last) for end, each in zip(ends, attempts, strict=True)]
    return round(sum(spans) / 3600, 4)


def _rank(runs: Sequence[ComparedRun], by: str) -> tuple[ComparedRun, ...]:
    sign = -1 if by in LARGER_IS_BETTER else 1

    def place(run: ComparedRun) -> tuple[bool, float]:
        number = getattr(run, FIELDS[by])
        return number is None, 0.0 if number is None else sign * number

    return tuple(sorted(runs, key=place))


def draw_losses(found: Comparison, path: Path) -> Path:
    """The loss curves as an SVG file: held-out where there are some, else of training. Errors: SpecError, RunError."""
    if path.suffix != ".svg":
        raise SpecError(f"{path}: wanted a file name that ends in .svg", hint="--plot losses.svg")
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        hint = "pip install 'lora-jobs[plot]'; the table needs nothing"
        raise SpecError("--plot needs matplotlib, which is not installed here", hint=hint) from error
    held_out = any(len(run.curve.evaluated) > 1 for run in found.runs)
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for run in found.runs:
        points = run.curve.evaluated if held_out else run.curve.train
        if points:
            label = show_variant(run.values) or run.run
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, losses, label=label if len(label) <= 60 else run.run, linewidth=1.2)
    axes.set_xlabel("step")
    axes.set_ylabel("held-out loss" if held_out else "training loss")
    if axes.lines and len(axes.lines) <= 20:
        axes.legend(fontsize="small")
    try:
        figure.savefig(path, format="svg")
    except OSError as error:
        raise RunError(f"can't write {path}: {error.strerror}", hint="choose another file with --plot") from error
    return path
