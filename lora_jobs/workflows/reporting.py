"""One run as one HTML page: gather what is there, say what is not."""

from __future__ import annotations

import time
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from lora_jobs import __version__
from lora_jobs.errors import SpecError
from lora_jobs.rendering.page import GENERATOR, Page, Sample, Table, Tile, render_page
from lora_jobs.runs import find_run, find_runs_root, find_sweep, load_metrics, load_submissions, write_atomic
from lora_jobs.spec import load_spec
from lora_jobs.units import format_duration, format_gib
from lora_jobs.workflows.detailing import describe_run
from lora_jobs.workflows.progress import load_prediction
from lora_jobs.workflows.report_curves import (
    draw_charts,
    draw_timeline,
    find_tone,
    format_bytes,
    format_moment,
    format_number,
    is_number,
)
from lora_jobs.workflows.report_origin import (
    collect_texts,
    describe_estimate,
    describe_origin,
    load_place,
    load_values,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lora_jobs.spec import JobSpec
    from lora_jobs.workflows.detailing import RunPage
    from lora_jobs.workflows.observing import RunStatus

MOST_SAMPLES = 6


def write_report(job: str | None, output: Path | None = None) -> Path:
    """Write a run's report to `output` (a file or a directory; none: the run's report.html). Returns the file.

    Errors: RunNotFoundError; SpecError for a sweep, or where another file stands at `output`.
    """
    root = find_runs_root()
    if (sweep := find_sweep(job, root)) is not None:
        first = sweep.tasks[0].run
        raise SpecError(
            f"{sweep.name} is a sweep, a report is of one run",
            hint=f"lora-jobs compare {sweep.name}, or lora-jobs report {first}",
        )
    run = find_run(job, root)
    path = run.directory / "report.html" if output is None else output
    path = path / f"{run.id}.html" if path.is_dir() else path
    refuse_foreign(path)
    text = render_page(build_page(str(run.directory)))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
    return path


def refuse_foreign(path: Path) -> None:
    """A report replaces a report, and nothing else."""
    if not path.exists():
        return
    with path.open("rb") as file:
        if f'content="{GENERATOR}"'.encode() not in file.read(4096):
            raise SpecError(f"{path} exists and is no report", hint="choose another file with -o: nothing was changed")


def build_page(job: str | None) -> Page:
    """Everything of a run's report, as it is now. Errors: RunNotFoundError, RunError."""
    run = find_run(job, find_runs_root())
    found = describe_run(job)
    rows, spec, place, now = load_metrics(run), load_spec(run.spec_path), load_place(run), time.time()
    status = found.status
    charts = draw_charts(rows, load_prediction(run))
    estimate = describe_estimate(load_values(run.estimate_path), found.memory)
    samples, targets = list_samples(rows), list_targets(rows)
    return Page(
        title=run.id,
        state=status.state,
        tone=find_tone(status.state),
        explanation=explain_status(status),
        subtitle=f"{shorten(spec.model.name_or_path)} on {shorten(spec.data.dataset or spec.data.train)}",
        tiles=list_tiles(found, rows),
        targets=targets,
        charts=charts,
        timeline=draw_timeline(found, load_submissions(run), rows, now),
        attempts=list_attempts(found),
        checkpoints=list_verdicts(found),
        samples=samples,
        estimate=estimate,
        origin=describe_origin(run, spec, place),
        texts=collect_texts(run, place),
        missing=tuple(name_missing(spec, found, rows, place)),
        footer=f"Written by lora-jobs {__version__} at {format_moment(now)}; the run may have gone on since.",
    )


def explain_status(status: RunStatus) -> str:
    """The state in plain words, Slurm's reason, and what can be done."""
    words = [status.explanation, status.reason_text, status.next_step and f"next: {status.next_step}"]
    return "; ".join(word for word in words if word)


def shorten(name: str) -> str:
    """An id as it is; of an absolute path the last two parts."""
    return "/".join(PurePath(name).parts[-2:]) if name.startswith("/") else name


def list_tiles(found: RunPage, rows: Sequence[dict[str, Any]]) -> tuple[Tile, ...]:
    """The figures that a reader looks for first."""
    status = found.status
    steps = "" if status.step is None else f"{status.step:,}"
    tiles = [
        Tile("Steps", steps, f"of {status.total_steps:,}" if status.total_steps else ""),
        *list_losses(rows),
        Tile(
            "Tokens/s", "" if status.tokens_per_second is None else format_number(status.tokens_per_second), "last step"
        ),
    ]
    if found.memory:
        first = found.memory[0]
        beside = f"{format_bytes(first.predicted_bytes)} predicted" if first.predicted_bytes else ""
        tiles.append(Tile("Memory, highest", format_gib(first.bytes), beside))
    seconds = sum(start.elapsed_seconds or 0 for start in found.starts)
    if seconds:
        count = "1 attempt" if len(found.starts) == 1 else f"{len(found.starts)} attempts"
        gpus = "" if found.gpu_hours is None else f", {found.gpu_hours:g} GPU-hours"
        tiles.append(Tile("Time", format_duration(seconds), count + gpus))
    return tuple(tile for tile in tiles if tile.value)


def list_losses(rows: Sequence[dict[str, Any]]) -> list[Tile]:
    """Held-out loss and perplexity, now and at first; without them the training loss."""
    measured = [row for row in rows if row.get("kind") == "eval" and is_number(row.get("eval_loss"))]
    if not measured:
        train = [row["loss"] for row in rows if row.get("kind") == "train" and is_number(row.get("loss"))]
        return [Tile("Training loss", format_number(train[-1]), f"{format_number(train[0])} at first")] if train else []
    first, last = measured[0], measured[-1]
    better = last["eval_loss"] < first["eval_loss"]
    tone = "" if len(measured) < 2 else "good" if better else "bad"
    before = "before" if first.get("phase") == "before" else "at first"
    tiles = [
        Tile("Held-out loss", format_number(last["eval_loss"]), f"{format_number(first['eval_loss'])} {before}", tone)
    ]
    if is_number(last.get("perplexity")) and is_number(first.get("perplexity")):
        note = f"{format_number(first['perplexity'])} {before}"
        tiles.append(Tile("Perplexity", format_number(last["perplexity"]), note, tone))
    return tiles


def list_targets(rows: Sequence[dict[str, Any]]) -> Table | None:
    """What the spec expected beside what the finished adapter reaches, and what was measured without a target."""
    final = next((row for row in reversed(rows) if row.get("kind") == "final"), None)
    if final is None:
        return None
    metrics, targets = (final.get(key) if isinstance(final.get(key), dict) else {} for key in ("metrics", "targets"))
    cells, tones = [], []
    for name in dict.fromkeys([*(targets or {}), *(metrics or {})]):
        target = (targets or {}).get(name)
        reached = (metrics or {}).get(name)
        shown = format_number(reached) if is_number(reached) else "not measured"
        if not isinstance(target, dict):
            cells.append((name.replace("_", " "), "", shown, ""))
            tones.append("")
            continue
        met = target.get("met") is True
        expected = target.get("expected")
        cells.append(
            (
                name.replace("_", " "),
                format_number(expected) if is_number(expected) else "",
                shown,
                "reached" if met else "not reached",
            )
        )
        tones.append("good" if met else "bad")
    return Table(("metric", "expected", "reached", "verdict"), tuple(cells), tuple(tones)) if cells else None


def list_samples(rows: Sequence[dict[str, Any]]) -> tuple[Sample, ...]:
    """Examples answered with and without the adapter, the newest of each prompt."""
    found: dict[str, Sample] = {}
    for row in rows:
        if row.get("kind") == "sample":
            words = [str(row.get(key, "")) for key in ("prompt", "expected", "without_adapter", "with_adapter")]
            found[words[0]] = Sample(*words)
    return tuple(found.values())[-MOST_SAMPLES:]


def list_attempts(found: RunPage) -> Table | None:
    """A row per start, as `status JOB` has it."""
    if not found.starts:
        return None
    cells = [
        (
            f"{number}: {start.state.lower()}",
            start.job_id,
            (start.started or "").replace("T", " ")[:16],
            "" if start.elapsed_seconds is None else format_duration(start.elapsed_seconds),
            "" if start.first_step is None else f"{start.first_step} to {start.last_committed_step or '?'}",
            start.node_list or "",
            start.reason or "",
        )
        for number, start in enumerate(found.starts, 1)
    ]
    columns = ("attempt", "job", "began", "lasted", "steps", "where", "why it ended")
    return Table(columns, tuple(cells), tuple(find_tone(start.state) for start in found.starts))


def list_verdicts(found: RunPage) -> Table | None:
    """A verdict per checkpoint."""
    if not found.checkpoints:
        return None
    cells = [
        (
            "good" if verdict.good else "not good",
            verdict.path.name,
            "" if verdict.manifest is None else format_gib(verdict.manifest.total_bytes),
            "" if verdict.committed_at is None else format_moment(verdict.committed_at)[:16],
            verdict.reason,
        )
        for verdict in found.checkpoints
    ]
    tones = tuple("good" if verdict.good else "bad" for verdict in found.checkpoints)
    return Table(("verdict", "checkpoint", "size", "committed", "checked"), tuple(cells), tones)


def explain_no_sample(spec: JobSpec, found: RunPage, rows: Sequence[dict[str, Any]]) -> str:
    """Why no example was answered; while the run goes on only what is sure by its spec."""
    if spec.deepspeed is not None and spec.deepspeed.zero_stage == 3:
        return "not taken under ZeRO-3, where each process has a piece of the weights only"
    if not spec.data.completion_only:
        return "there are none, the examples have no prompt apart from their completion (data.completion_only: false)"
    if failed := [row for row in rows if row.get("event") == "sample_failed"]:
        return f"could not be generated: {failed[-1].get('reason')}"
    if any(start.state == "COMPLETED" for start in found.starts):
        return "there are none, the examples have no prompt"
    return "taken when the run is finished"


def name_missing(spec: JobSpec, found: RunPage, rows: Sequence[dict[str, Any]], place: dict[str, Any]) -> list[str]:
    """What a reader may look for and does not find, with the reason."""
    kinds = {row.get("kind") for row in rows}
    lines = []
    if "train" not in kinds:
        lines.append("Curves: no step was trained yet.")
    if spec.data.eval is None:
        lines.append("Held-out loss: the spec has no data.eval.")
    elif "eval" not in kinds:
        lines.append("Held-out loss: nothing was evaluated yet.")
    if not spec.training.targets:
        lines.append("Expected results: the spec has no training.targets.")
    elif "final" not in kinds:
        lines.append("Expected and reached: measured when the run is finished.")
    if "sample" not in kinds:
        lines.append(f"Answers before and after: {explain_no_sample(spec, found, rows)}.")
    if not found.starts:
        lines.append("Attempts: the run has not started yet.")
    if not found.checkpoints:
        lines.append("Checkpoints: none is there; they are removed, or none was committed yet.")
    if not place:
        lines.append("Host, GPUs and packages: no attempt has written them.")
    return [*lines, *found.notes]
