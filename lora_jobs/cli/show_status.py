"""Runs to the screen, one line each: once, or again and again without flicker."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import TYPE_CHECKING

from lora_jobs.cli.screen import Line, build_console, clean, find_width, say, warn
from lora_jobs.cli.status_line import cut, describe_status, format_job, format_state

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_jobs.workflows.observing import StatusReport

WIDEST_CELL = 9
"""Of job and state, in which all rows are set below one another: one longer cell moves its own row alone."""


def show_status(report: StatusReport) -> None:
    """One line a run, newest first, each no wider than the screen (a pipe: 100 columns)."""
    if not report.runs:
        say(describe_nothing(report))
    for line in render_status(report, width=find_width(), now=datetime.now()):
        say(line.plain, line.style)
    for note in report.notes:
        warn(f"note: {note}")


def describe_nothing(report: StatusReport) -> str:
    """Why there is no line at all."""
    if not report.elsewhere:
        return "no runs yet: lora-jobs submit SPEC starts one"
    older = f"; {report.hidden} older runs: lora-jobs status --all" if report.hidden else ""
    return f"none of your runs is known to be in partition {report.partition} ({report.elsewhere} looked at){older}"


def render_status(report: StatusReport, *, width: int, now: datetime) -> list[Line]:
    """The lines of `status`: run, job, state, and what matters in that state, as `width` has room for it."""
    if not report.runs:
        return []
    rows = [((clean(row.run), clean(format_job(row)), clean(format_state(row))), row) for row in report.runs]
    most = max(12, width * 24 // 100)
    widest = (most, WIDEST_CELL, WIDEST_CELL)
    columns = [min(max(len(cells[place]) for cells, _ in rows), size) for place, size in enumerate(widest)]
    head = " ".join(name.ljust(size) for name, size in zip(("RUN", "JOB", "STATE"), columns, strict=True))
    lines = [Line(cut(head, width).rstrip(), "bold")]
    for (run, job, state), status in rows:
        cells = (_cut_middle(run, most), cut(job, most), cut(state, most))
        start = " ".join(text.ljust(size) for text, size in zip(cells, columns, strict=True))
        style = "green" if status.state == "COMPLETED" else "" if status.active else "yellow"
        words = clean(describe_status(status, now, width - len(start) - 2))
        lines.append(Line(cut(f"{start}  {words}".rstrip(), width), style))
    if report.hidden:
        lines.append(Line(cut(f"{report.hidden} older runs: lora-jobs status --all", width), "dim"))
    return lines


def _cut_middle(text: str, width: int) -> str:
    """A run's name ends in its number, which tells it from the others of its spec."""
    tail = width // 3
    return text if len(text) <= width else f"{text[: width - tail - 1]}…{text[len(text) - tail :]}"


def watch_status(reports: Iterable[StatusReport]) -> None:
    """Redraw in place without clearing the screen: each frame is one write, lines are overwritten, the rest erased.

    Where the output is no terminal, a report is printed when it differs from the one before.
    """
    if not sys.stdout.isatty():
        before: list[str] = []
        for report in reports:
            lines = [line.plain for line in render_status(report, width=find_width(), now=datetime.now())]
            lines = lines or [describe_nothing(report)]
            lines += [f"note: {note}" for note in report.notes]
            if lines != before:
                sys.stdout.write("\n".join(lines) + "\n\n")
                sys.stdout.flush()
            before = lines
        return
    last = None
    console = build_console()
    try:
        with console.screen():
            for report in reports:
                last = report
                sys.stdout.write(render_frame(report, find_width(), console.height, datetime.now()))
                sys.stdout.flush()
    finally:
        if last is not None:  # Ctrl-C too leaves the last table behind
            show_status(last)


def render_frame(report: StatusReport, width: int, height: int, now: datetime) -> str:
    """One frame for a terminal: from its top left corner, every line erased to its end, then what is below."""
    lines = [line.plain for line in render_status(report, width=width, now=now)]
    lines = lines or [cut(describe_nothing(report), width)]
    lines += [cut(clean(f"note: {note}"), width) for note in report.notes]
    lines += ["", cut(f"{now:%H:%M:%S}  Ctrl-C ends", width)]
    return "\x1b[H" + "\r\n".join(f"{line}\x1b[K" for line in lines[:height]) + "\x1b[J"
