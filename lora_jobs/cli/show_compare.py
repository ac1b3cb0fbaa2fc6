"""A comparison to the screen: a ranked table, each number also as a place between the best and the worst."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_jobs.cli.screen import add_row, build_console, build_table, say, warn
from lora_jobs.spec import show_variant
from lora_jobs.units import GIB, format_gib

if TYPE_CHECKING:
    from pathlib import Path

    from lora_jobs.workflows.comparing import ComparedRun, Comparison

SCALE_WIDTH = 24
WORDS = {
    "eval_loss": "best held-out loss",
    "final_eval_loss": "held-out loss at the end",
    "loss": "training loss at the end",
    "tokens_per_second": "tokens per second",
    "memory": "memory at the peak",
    "gpu_hours": "GPU-hours",
}


def show_comparison(found: Comparison) -> None:
    """A row per run, best first: values, loss, memory, speed, cost; then the losses on one scale."""
    of = f"{found.sweep}: " if found.sweep else ""
    say(f"{of}{len(found.runs)} runs by {WORDS[found.by]}, best first", "bold")
    heads = ("TASK" if found.sweep else "RUN", "TRIED", "STATE", "STEP", "EVAL LOSS", "LOSS", "GiB", "TOK/S", "GPU-H")
    table = build_table(*heads, right=heads[3:])
    for run in found.runs:
        style = "" if run.state == "COMPLETED" else "yellow"
        cells = (
            name_run(run, found),
            show_variant(run.values, short=True),
            run.state,
            run.step,
            _four(_find_loss(run, found.by)),
            _four(run.loss),
            format_memory(run),
            _round(run.tokens_per_second, 0),
            _round(run.gpu_hours, 2),
        )
        add_row(table, *cells, style=style)
    build_console().print(table)
    _show_scale(found)
    for note in found.notes:
        warn(f"note: {note}")


def _find_loss(run: ComparedRun, by: str) -> float | None:
    return run.final_eval_loss if by == "final_eval_loss" else run.best_eval_loss


def _show_scale(found: Comparison) -> None:
    """Every number as a mark between the lowest and the highest; nothing where there are not two."""
    numbers = [number for run in found.runs if (number := found.find_number(run)) is not None]
    if len(set(numbers)) < 2:
        return
    low, high = min(numbers), max(numbers)
    say()
    say(f"{WORDS[found.by]}, from {_show(low, found.by)} to {_show(high, found.by)}")
    table = build_table("", "", "", right=(2,))
    for run in found.runs:
        number = found.find_number(run)
        if number is not None:
            add_row(table, f"  {name_run(run, found)}", draw_place(number, low, high), _show(number, found.by))
    build_console().print(table)


def name_run(run: ComparedRun, found: Comparison) -> str:
    """The run's id; within one sweep the number of its task."""
    return run.run.removeprefix(f"{found.sweep}-") if found.sweep else run.run


def draw_place(number: float, low: float, high: float, width: int = SCALE_WIDTH) -> str:
    """A mark on a line from `low` to `high`: ·····●····."""
    place = round((number - low) / (high - low) * (width - 1))
    return "·" * place + "●" + "·" * (width - 1 - place)


def format_memory(run: ComparedRun) -> str:
    """Measured and estimated, in GiB: 51.0/52.0; one alone is marked as estimated."""
    if not run.memory_peak_bytes:
        return f"-/{run.predicted_bytes / GIB:.1f}" if run.predicted_bytes else ""
    predicted = f"/{run.predicted_bytes / GIB:.1f}" if run.predicted_bytes else ""
    return f"{run.memory_peak_bytes / GIB:.1f}{predicted}"


def show_drawn(path: Path) -> None:
    """Where the curves went."""
    say(f"wrote {path}")


def _show(number: float, by: str) -> str:
    if by == "memory":
        return format_gib(round(number))
    return f"{number:.4f}" if "loss" in by else f"{number:.2f}"


def _four(number: float | None) -> str:
    return "" if number is None else f"{number:.4f}"


def _round(number: float | None, digits: int) -> str:
    return "" if number is None else f"{number:.{digits}f}"
