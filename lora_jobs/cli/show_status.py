"""Runs to the screen, one line each: once, or again and again without flicker."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import TYPE_CHECKING

from lora_jobs.cli.screen import Line, build_console, clean, find_width, say, warn
from lora_jobs.units import GIB

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_jobs.workflows.observing import RunStatus, StatusReport
    from lora_jobs.workflows.results import Result


def show_status(report: StatusReport) -> None:
    """One line a run, newest first, each no wider than the screen (a pipe: 100 columns)."""
    if not report.runs:
        say("no runs yet: lora-jobs submit SPEC starts one")
    for line in render_status(report, width=find_width(), now=datetime.now()):
        say(line.plain, line.style)
    for note in report.notes:
        warn(f"note: {note}")


def render_status(report: StatusReport, *, width: int, now: datetime) -> list[Line]:
    """The lines of `status`: run, job, state, and what matters in that state; cut at `width`."""
    if not report.runs:
        return []
    rows = [(clean(row.run), clean(format_job(row)), clean(format_state(row)), row) for row in report.runs]
    most = max(12, min(24, width // 4))
    columns = [min(max(len(text) for text in column), most) for column in zip(*[row[:3] for row in rows], strict=True)]
    head = " ".join(name.ljust(size) for name, size in zip(("RUN", "JOB", "STATE"), columns, strict=True))
    lines = [Line(_cut(head, width).rstrip(), "bold")]
    for *cells, status in rows:
        start = " ".join(_cut(text, size).ljust(size) for text, size in zip(cells, columns, strict=True))
        style = "green" if status.state == "COMPLETED" else "" if status.active else "yellow"
        lines.append(Line(_cut(f"{start}  {clean(describe_status(status, now))}".rstrip(), width), style))
    if report.hidden:
        lines.append(Line(_cut(f"{report.hidden} older runs: lora-jobs status --all", width), "dim"))
    return lines


def describe_status(status: RunStatus, now: datetime) -> str:
    """What matters about a run in its state, most important first; of a sweep how many tasks are in which."""
    if status.sweep is not None and status.sweep == status.run:
        parts = [status.explanation]
        if status.state == "PENDING":
            parts += [f"the first is {status.rank} of {status.pending_jobs}" if status.rank else ""]
            parts += [f"starts {format_when(status.expected_start, now)}" if status.expected_start else ""]
            parts += [status.reason_text or ""]
        return ", ".join(part for part in (*parts, status.next_step or "") if part)
    if not status.active:
        return _describe_end(status)
    if status.state == "RUNNING":
        parts = [*_describe_training(status, now), status.reason_text or ""]
    else:
        parts = [f"{status.rank} of {status.pending_jobs} pending" if status.rank else ""]
        parts += [f"starts {format_when(status.expected_start, now)}" if status.expected_start else ""]
        parts += [status.reason_text or status.reason or status.explanation]
        parts += [f"prio {status.priority}" if status.priority else ""]
    return ", ".join(part for part in parts if part)


def _describe_training(status: RunStatus, now: datetime) -> list[str]:
    parts = [format_steps(status) or "starting", f"loss {status.loss:.3f}" if status.loss is not None else ""]
    parts += [f"{status.tokens_per_second:.0f} tok/s" if status.tokens_per_second else ""]
    parts += [f"{format_span(status.remaining_seconds)} left" if status.remaining_seconds is not None else ""]
    parts += [f"ends {format_when(status.expected_finish, now, span=False)}" if status.expected_finish else ""]
    return [*parts, format_memory(status)]


def _describe_end(status: RunStatus) -> str:
    """Why it ended and what to do next: "timed out at step 480, committed 470: lora-jobs resume 2584773"."""
    words = {"TIMEOUT": "timed out", "PREEMPTED": "preempted", "CANCELLED": "cancelled", "FAILED": "failed",
             "OUT_OF_MEMORY": "out of host memory", "NODE_FAIL": "node failed", "SAVED": "saved and stopped",
             "KILLED": "killed", "COMPLETED": "done"}.get(status.state, status.explanation)  # fmt: skip
    where = f" at step {status.step}" if status.step is not None else ""
    if status.state == "COMPLETED":
        loss = f", held-out loss {status.eval_loss:.3f}" if status.eval_loss is not None else ""
        if status.adapter is None:
            return f"ended with 0 but left no adapter: {status.next_step or ''}"
        return f"done{where}{loss}"
    committed = "" if status.last_committed_step is None else f", committed {status.last_committed_step}"
    text = f"{words}{where}{committed}" + (f": {status.next_step}" if status.next_step else "")
    return text + (f" ({status.reason})" if status.reason else "")


def format_job(status: RunStatus) -> str:
    """The job id, an array's tasks folded into their number."""
    text = status.job_id or "-"
    if status.sweep is not None and status.sweep == status.run:
        return text
    tasks = sum((status.tasks or {}).values())
    return f"{text.partition('_')[0]} x{tasks}" if tasks > 1 else text


def format_state(status: RunStatus) -> str:
    tasks = status.tasks or {}
    if len(tasks) > 1:
        return f"{status.state} {tasks.get(status.state, 0)}/{sum(tasks.values())}"
    return status.state


def format_memory(status: RunStatus) -> str:
    if not status.memory_peak_bytes:
        return ""
    if not status.predicted_bytes:
        return f"{status.memory_peak_bytes / GIB:.1f} GiB"
    return f"{status.memory_peak_bytes / GIB:.1f}/{status.predicted_bytes / GIB:.1f} GiB"


def format_result(result: Result) -> str:
    """A final metric: "21.3 (18 expected: reached)"."""
    if result.reached is None:
        return f"{result.expected:g} expected"
    target = (
        "" if result.expected is None else f" ({result.expected:g} expected: {'' if result.met else 'NOT '}reached)"
    )
    return f"{result.reached:.4g}{target}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def format_span(seconds: float) -> str:
    """A length of time in one unit: "45 s", "12 min", "3 h", "2 d"."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= (2 * size if unit == "d" else size):
            return f"{round(seconds / size)} {unit}"
    return f"{round(seconds)} s"


def format_when(text: str | None, now: datetime, *, span: bool = True) -> str:
    """A local ISO time as a clock time and how far off: "21:44 in 3 h"; with the day when it is not today."""
    try:
        then = datetime.fromisoformat(text or "")
    except ValueError:
        return text or "unknown"
    day = "" if then.date() == now.date() else f"{then:%a} " if abs((then - now).days) < 6 else f"{then:%d %b} "
    seconds = (then - now).total_seconds()
    away = f" in {format_span(seconds)}" if seconds > 0 else " (any moment)"
    return f"{day}{then:%H:%M}" + (away if span else "")


def watch_status(reports: Iterable[StatusReport]) -> None:
    """Redraw in place without clearing the screen: each frame is one write, lines are overwritten, the rest erased.

    Where the output is no terminal, a report is printed when it differs from the one before.
    """
    if not sys.stdout.isatty():
        before: list[str] = []
        for report in reports:
            lines = [line.plain for line in render_status(report, width=find_width(), now=datetime.now())]
            lines += [f"note: {note}" for note in report.notes]
            if lines != before:
                sys.stdout.write("\n".join(lines or ["no runs"]) + "\n\n")
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
    lines = [line.plain for line in render_status(report, width=width, now=now)] or ["no runs"]
    lines += [_cut(clean(f"note: {note}"), width) for note in report.notes]
    lines += ["", _cut(f"{now:%H:%M:%S}  Ctrl-C ends", width)]
    return "\x1b[H" + "\r\n".join(f"{line}\x1b[K" for line in lines[:height]) + "\x1b[J"


def format_steps(status: RunStatus) -> str:
    return "" if status.step is None else f"{status.step}/{status.total_steps or '?'}"
