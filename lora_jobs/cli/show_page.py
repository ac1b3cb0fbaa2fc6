"""One run on one page, and why a job waits."""

from __future__ import annotations

from datetime import datetime
from itertools import groupby
from textwrap import fill
from typing import TYPE_CHECKING

from lora_jobs.cli.screen import add_row, build_console, build_table, clean_log, find_width, say, warn
from lora_jobs.cli.show import show_verdicts
from lora_jobs.cli.status_line import (
    format_job,
    format_result,
    format_span,
    format_state,
    format_steps,
    format_when,
)
from lora_jobs.units import format_duration, format_gib

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_jobs.workflows.detailing import RunPage
    from lora_jobs.workflows.explaining import Explanation
    from lora_jobs.workflows.measuring import Measured
    from lora_jobs.workflows.observing import RunStatus
    from lora_jobs.workflows.priorities import FactorRow


def show_page(page: RunPage) -> None:
    """One run on one page."""
    status, now = page.status, datetime.now()
    place = f"{status.rank} of {status.pending_jobs} pending in {status.partition}" if status.rank else None
    rows = {
        "run": status.run,
        "directory": status.directory,
        "job": f"{format_job(status)} ({status.backend})" if status.job_id else "never submitted",
        "state": f"{format_state(status)}: {status.explanation}",
        "reason": status.reason and f"{status.reason}" + (f": {status.reason_text}" if status.reason_text else ""),
        "partition": None if place else status.partition,
        "rank": place,
        "priority": status.priority,
        "submitted": status.submitted,
        "expected start": status.expected_start
        and f"{status.expected_start}, {format_when(status.expected_start, now)}",
        "elapsed / limit": _times(status),
        "time left": None if status.remaining_seconds is None else format_span(status.remaining_seconds),
        "expected finish": status.expected_finish,
        "step": format_steps(status),
        "committed": status.last_committed_step,
        "loss": _number(status.loss),
        "held-out loss": _number(status.eval_loss),
        "tokens/s": None if status.tokens_per_second is None else f"{status.tokens_per_second:.0f}",
        **{f"memory, {one.name.replace('_', ' ')}": _format_measured(one) for one in page.memory},
        "GPU-hours": None if page.gpu_hours is None else f"{page.gpu_hours:g} used so far, on {_gpus(page)} at a time",
        **{f"final {result.name.replace('_', ' ')}": format_result(result) for result in page.results},
        "adapter": status.adapter,
        "script": page.script,
        "next": status.next_step or (f"lora-jobs why {status.run}" if status.state == "PENDING" else None),
    }
    table = build_table("", "")
    for name, value in rows.items():
        if value not in (None, ""):
            add_row(table, name, value)
    build_console().print(table)
    _show_factors(page.factors)
    _show_starts(page)
    if page.checkpoints:
        say()
        say("checkpoints", "bold")
        show_verdicts(page.checkpoints)
    if page.log:
        say()
        say(f"end of {page.log}", "bold")
        for line in page.log_lines:
            say(f"  {clean_log(line)}")
    for note in page.notes:
        warn(f"note: {note}")


def _gpus(page: RunPage) -> str:
    """How many, "4 then 2" where a resume has changed it."""
    numbers = [start.gpus for start in page.starts] or [page.gpus]
    return " then ".join(str(number) for number, _ in groupby(numbers))


def _format_measured(measured: Measured) -> str:
    if measured.predicted_bytes is None or measured.difference is None:
        return format_gib(measured.bytes)
    return (
        f"{format_gib(measured.bytes)}, {format_gib(measured.predicted_bytes)} predicted ({measured.difference:+.1%})"
    )


def _show_factors(factors: Iterable[FactorRow]) -> None:
    rows = list(factors)
    if not rows:
        return
    say()
    table = build_table("PRIORITY", "POINTS", "OF", "WHAT CHANGES IT", right=("POINTS", "OF"))
    for row in rows:
        add_row(table, row.name, row.points, row.weight, row.changes)
    build_console().print(table)


def _show_starts(page: RunPage) -> None:
    if not page.starts:
        return
    say()
    table = build_table("START", "JOB", "STATE", "BEGAN", "LASTED", "STEPS", "WHERE", "WHY IT ENDED")
    for number, start in enumerate(page.starts, 1):
        steps = "" if start.first_step is None else f"{start.first_step}-{start.last_committed_step or '?'}"
        lasted = None if start.elapsed_seconds is None else format_span(start.elapsed_seconds)
        began = (start.started or "").replace("T", " ")[5:16]
        add_row(table, number, start.job_id, start.state, began, lasted, steps, start.node_list, start.reason)
    build_console().print(table)


def show_why(why: Explanation) -> None:
    """The reason in plain words, the numbers behind it, and what can be done."""
    name = " ".join(part for part in (why.run, f"job {why.job_id}" if why.job_id else "") if part)
    say(f"{name}: {why.state}" + (f", {why.reason}" if why.reason else ""), "bold")
    say(fill(why.meaning, find_width(), initial_indent="  ", subsequent_indent="  ", break_long_words=False))
    turn = {"wait": "the cluster's turn: it can start by itself", "you": "your turn: it will not start by itself",
            "admin": "an administrator's turn"}.get(why.turn)  # fmt: skip
    if why.state == "PENDING":
        say(f"  {turn}", "" if why.turn == "wait" else "yellow")
        start = format_when(why.expected_start, datetime.now()) if why.expected_start else "Slurm gives none"
        table = build_table("", "")
        for what, value in [*why.numbers, ("priority", why.priority), ("expected start", start)]:
            if value is not None:
                add_row(table, f"  {what}", value)
        build_console().print(table)
        _show_factors(why.factors)
        say()
    say("what you can do", "bold")
    for action in why.actions:
        say(fill(action, find_width(), initial_indent="  - ", subsequent_indent="    ", break_long_words=False))
    for note in why.notes:
        warn(f"note: {note}")


def _times(status: RunStatus) -> str:
    elapsed = "" if status.elapsed_seconds is None else format_duration(status.elapsed_seconds)
    limit = "" if status.limit_seconds is None else format_duration(status.limit_seconds)
    return f"{elapsed or '-'} / {limit or '-'}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
