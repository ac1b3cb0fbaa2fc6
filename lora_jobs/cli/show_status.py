"""Runs to the screen, one line each: once, or again and again without flicker."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

from lora_jobs.cli.screen import Line, build_console, clean, find_width, say, warn
from lora_jobs.units import GIB

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_jobs.workflows.observing import RunStatus, StatusReport
    from lora_jobs.workflows.results import Result

LEAST_REASON = 12
"""Letters of a reason that still say something; with room for fewer it is left out."""

WIDEST_CELL = 9
"""Of job and state, in which all rows are set below one another: one longer cell moves its own row alone."""

SPEAKING_STATES = frozenset({"TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL"})
"""Slurm's reason for these only says the state once more."""

WITH_NODES = frozenset({"CONFIGURING", "COMPLETING", "SIGNALING", "STAGE_OUT", "RESIZING"})
"""In these a job holds its nodes: what it waited for before, and its priority, are of the past."""


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
    lines = [Line(_cut(head, width).rstrip(), "bold")]
    for (run, job, state), status in rows:
        cells = (_cut_middle(run, most), _cut(job, most), _cut(state, most))
        start = " ".join(text.ljust(size) for text, size in zip(cells, columns, strict=True))
        style = "green" if status.state == "COMPLETED" else "" if status.active else "yellow"
        words = clean(describe_status(status, now, width - len(start) - 2))
        lines.append(Line(_cut(f"{start}  {words}".rstrip(), width), style))
    if report.hidden:
        lines.append(Line(_cut(f"{report.hidden} older runs: lora-jobs status --all", width), "dim"))
    return lines


class Form(NamedTuple):
    """One way to say it; `reason` may be cut at its end, to no less than `least` letters."""

    before: str
    reason: str = ""
    after: str = ""
    least: int = LEAST_REASON


def describe_status(status: RunStatus, now: datetime, room: int = 1000) -> str:
    """What matters about a run in its state, in at most `room` columns; of a sweep how many tasks are in which."""
    if status.sweep is not None and status.sweep == status.run:
        forms = _list_sweep_forms(status, now)
    elif not status.active:
        forms = _list_end_forms(status)
    elif status.state == "RUNNING":
        forms = _list_running_forms(status, now)
    else:
        forms = _list_waiting_forms(status, now)
    for before, reason, after, least in forms:
        left = room - len(before) - len(after)
        if left >= min(len(reason), least):
            return before + _cut(reason, left) + after
    return _cut("".join(forms[-1][:3]), room)


def _join(*parts: str, mark: str = ", ") -> str:
    return mark.join(part for part in parts if part)


def _list_waiting_forms(status: RunStatus, now: datetime) -> list[Form]:
    """Rank, expected start, reason, priority. "pending" goes first (the state's column says it), then the reason."""
    rank = f"{status.rank} of {status.pending_jobs}" if status.rank else ""
    start = f"starts {format_when(status.expected_start, now)}" if status.expected_start else ""
    short = start.replace("starts", "at", 1)
    reason = status.reason_text or (status.reason if status.state not in WITH_NODES else "") or status.explanation
    priority = f"prio {status.priority}" if status.priority and status.state not in WITH_NODES else ""
    fronts = [_join(rank and f"{rank} pending", start), _join(rank, start), _join(rank, short)]
    whole = [Form(front and f"{front}, ", reason, priority and f", {priority}", len(reason)) for front in fronts]
    bare = start and f"at {format_when(status.expected_start, now, span=False)}"
    least = [Form(_join(rank, text, priority)) for text in (short, bare)]
    return [*whole, whole[-1]._replace(least=LEAST_REASON), *least]


def _list_running_forms(status: RunStatus, now: datetime) -> list[Form]:
    """Step, loss, tokens/s, time left, expected finish, memory: all of it, in fewer letters, then less of it."""
    steps = format_steps(status) or "starting"
    loss, short_loss = (f"loss {status.loss:.{digits}f}" if status.loss is not None else "" for digits in (3, 2))
    speed = f"{status.tokens_per_second:.0f} tok/s" if status.tokens_per_second else ""
    left = f"{format_span(status.remaining_seconds)} left" if status.remaining_seconds is not None else ""
    finish = f"ends {format_when(status.expected_finish, now, span=False)}" if status.expected_finish else ""
    memory, short = format_memory(status), format_memory(status, short=True)
    forms = [_join(steps, loss, speed, left, finish, memory), _join(steps, loss, speed, left, finish, memory, mark=" ")]
    fewer = ((short_loss, speed, left, finish), (short_loss, left, finish), (left, finish), (finish,), ())
    forms += [_join(steps, *shown, short, mark=" ") for shown in fewer]
    return [Form(text) for text in forms]


def _list_sweep_forms(status: RunStatus, now: datetime) -> list[Form]:
    """How many tasks are in which state, and the next step; of one that waits, its first task's place and start."""
    if status.state != "PENDING":
        words, command = status.explanation, status.next_step or ""
        return [Form("", words, command and f", {command}"), Form(command or words), Form("", words)]
    rank = f"{status.rank} of {status.pending_jobs}" if status.rank else ""
    start = f"starts {format_when(status.expected_start, now)}" if status.expected_start else ""
    fronts = [_join(status.explanation, rank and f"the first is {rank}", start), _join(status.explanation, rank, start)]
    reason = status.reason_text or ""
    return [*(Form(f"{front}{reason and ', '}", reason) for front in fronts), Form(fronts[-1])]


def _list_end_forms(status: RunStatus) -> list[Form]:
    """Why it ended and what to do next: "timed out at step 480, committed 470: lora-jobs resume 2584773".

    The command is whole or not there. Slurm's reason is the first to go; one that was recorded says more than the step.
    """
    words = {"TIMEOUT": "timed out", "PREEMPTED": "preempted", "CANCELLED": "cancelled", "FAILED": "failed",
             "OUT_OF_MEMORY": "out of host memory", "NODE_FAIL": "node failed", "SAVED": "saved and stopped",
             "KILLED": "killed", "COMPLETED": "done"}.get(status.state, status.explanation)  # fmt: skip
    where = f"at step {status.step}" if status.step is not None else ""
    ended = _join(words, where, mark=" ")
    if status.state == "COMPLETED":
        return [Form(_join(ended, f"held-out loss {status.eval_loss:.3f}" if status.eval_loss is not None else ""))]
    committed = "" if status.last_committed_step is None else f"committed {status.last_committed_step}"
    places = [_join(ended, committed), _join(where, committed), committed, ""]
    texts = [text for place in places if (text := _join(place, status.next_step or "", mark=": "))]
    slurm_says = "" if status.state in SPEAKING_STATES else status.reason_text or ""
    recorded = "" if status.reason_text else status.reason or ""
    reasons = [Form(f"{texts[0]} (", slurm_says, ")", len(slurm_says))] if slurm_says else []
    reasons += [Form(f"{text} (", recorded, ")") for text in texts if recorded]
    rest = [Form(f"{places[0]} (", recorded, ")")] if recorded else []
    return [*reasons, *map(Form, texts), *rest, Form(places[0])]


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


def format_memory(status: RunStatus, *, short: bool = False) -> str:
    """The peak, and the prediction: "41.0/44.0 GiB"; short, of tens of GiB without a fraction: "41/44G"."""
    if not status.memory_peak_bytes:
        return ""
    sizes = [size / GIB for size in (status.memory_peak_bytes, status.predicted_bytes) if size]
    if short:
        return "/".join(f"{size:.{0 if max(sizes) >= 10 else 1}f}" for size in sizes) + "G"
    return "/".join(f"{size:.1f}" for size in sizes) + " GiB"


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


def _cut_middle(text: str, width: int) -> str:
    """A run's name ends in its number, which tells it from the others of its spec."""
    tail = width // 3
    return text if len(text) <= width else f"{text[: width - tail - 1]}…{text[len(text) - tail :]}"


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
    lines = lines or [_cut(describe_nothing(report), width)]
    lines += [_cut(clean(f"note: {note}"), width) for note in report.notes]
    lines += ["", _cut(f"{now:%H:%M:%S}  Ctrl-C ends", width)]
    return "\x1b[H" + "\r\n".join(f"{line}\x1b[K" for line in lines[:height]) + "\x1b[J"


def format_steps(status: RunStatus) -> str:
    return "" if status.step is None else f"{status.step}/{status.total_steps or '?'}"
