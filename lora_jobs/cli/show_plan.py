"""A plan to the screen: one line a way to run the job, the one that ends first at the top."""

from __future__ import annotations

import shlex
import sys
from datetime import datetime
from textwrap import fill
from typing import TYPE_CHECKING

from lora_jobs.cli.screen import add_row, build_console, build_table, find_width, say
from lora_jobs.units import format_gib

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_jobs.workflows.plan_rows import PlanRow
    from lora_jobs.workflows.planning import JobPlan


def show_plan(plan: JobPlan, submit: str, *, now: datetime | None = None) -> None:
    """The table, why rows can't run, the notes, and the `submit` command line with the best row added."""
    now = now or datetime.now()
    say(f"{plan.spec.name}: {plan.spec.model.name_or_path} on {plan.environment.name}; nothing was submitted", "bold")
    table = build_table(
        "ROW", "GPUS", "MEMORY", "START", "TAKES", "FINISH", "GPU-H", right=("MEMORY", "TAKES", "GPU-H")
    )
    for row in plan.rows:
        add_row(table, *_cells(row, now), style="" if row.possible else "dim")
    build_console().print(table)
    for problem, names in _group_problems(plan).items():
        say(f"  {shorten_names(names)}: {problem}", "yellow")
    _show_basis(plan)
    for note in plan.notes:
        say(f"note: {note}")
    best = next((row for row in plan.rows if row.possible), None)
    if best is not None:
        say(f"next: {submit} --plan {shlex.quote(best.name)}", "bold")


def show_question(number: int, count: int) -> None:
    """On a terminal, how far the questions to Slurm are; the line is gone with the last."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\rasking sbatch --test-only {number}/{count}" + ("\r\x1b[K" if number == count else ""))
        sys.stderr.flush()


def _cells(row: PlanRow, now: datetime) -> tuple[str, ...]:
    asked = row.spec.resources
    gpu = row.gpu.name if row.gpu else "?"
    memory = format_gib(row.verdict.estimate.peak_bytes) if row.verdict else "?"
    takes = format_span(row.duration.seconds) if row.duration else "unknown"
    takes += f" in {row.jobs} jobs" if row.jobs > 1 else ""
    finish = format_clock(row.expected_finish, now) if row.possible else ""
    hours = "" if row.gpu_hours is None else f"{row.gpu_hours:.1f}"
    return row.name, f"{asked.world_size} x {gpu}", memory, _start(row, now), takes, finish, hours


def _start(row: PlanRow, now: datetime) -> str:
    if row.verdict is not None and not row.verdict.fits:
        return "does not fit"
    if row.problems:
        return "can't run"
    return format_moment(row.expected_start, now) if row.expected_start else row.start_note or "no estimate"


def _group_problems(plan: JobPlan) -> dict[str, list[str]]:
    """What is in the way, and of which rows."""
    found: dict[str, list[str]] = {}
    for row in plan.rows:
        problems = list(row.problems)
        if row.verdict is not None and not row.verdict.fits and row.gpu is not None:
            needed, usable = format_gib(row.verdict.estimate.peak_bytes), format_gib(row.gpu.usable_bytes)
            problems.append(f"does not fit: {needed} needed, {usable} usable on {row.gpu.name}")
        for problem in problems:
            found.setdefault(problem, []).append(row.name)
    return found


def shorten_names(names: Sequence[str]) -> str:
    """The first three, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _show_basis(plan: JobPlan) -> None:
    """Where the durations come from, once each."""
    known = [row for row in plan.rows if row.duration is not None]
    if plan.rows and (first := plan.rows[0]).duration is not None:
        parts = ", ".join(
            f"{name} {format_span(part)}" for name, part in first.duration.components.items() if part >= 1
        )
        say(f"{first.name}: {first.duration.steps} steps: {parts}", "dim")
    for basis in dict.fromkeys(row.duration.basis for row in known if row.duration):
        names = [row.name for row in known if row.duration and row.duration.basis == basis]
        words = f"speed: {basis} ({shorten_names(names)})"
        say(fill(words, find_width(), subsequent_indent="  ", break_long_words=False, break_on_hyphens=False), "dim")
    if any(row.jobs > 1 for row in known):
        say("several jobs: a run longer than its time limit goes on by itself; the waits in between come on top", "dim")


def format_moment(moment: str, now: datetime) -> str:
    """When, and how long until then: "Sat 02:35 (in 5.0 h)"; "now" within a minute."""
    seconds = (datetime.fromisoformat(moment) - now).total_seconds()
    return "now" if seconds < 60 else f"{format_clock(moment, now)} (in {format_span(seconds)})"


def format_clock(moment: str | None, now: datetime) -> str:
    """The clock for today, with the weekday within a week, else with the date."""
    if moment is None:
        return "unknown"
    then = datetime.fromisoformat(moment)
    days = (then.date() - now.date()).days
    return f"{then:%H:%M}" if days == 0 else f"{then:%a %H:%M}" if 0 < days < 7 else f"{then:%Y-%m-%d %H:%M}"


def format_span(seconds: float) -> str:
    """About how long: 40 s, 12 min, 3.5 h, 2.1 d."""
    for size, unit, digits in ((86400, "d", 1), (3600, "h", 1), (60, "min", 0)):
        if seconds >= size * (1 if unit != "d" else 2):
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} s"
