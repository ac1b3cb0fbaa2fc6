"""What one line of status says of a run in its state, in as many words as there is room for."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

from lora_jobs.units import GIB

if TYPE_CHECKING:
    from lora_jobs.workflows.observing import RunStatus
    from lora_jobs.workflows.results import Result

LEAST_REASON = 12
"""Letters of a reason that still say something; with room for fewer it is left out."""

SPEAKING_STATES = frozenset({"TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL"})
"""Slurm's reason for these only says the state once more."""

WITH_NODES = frozenset({"CONFIGURING", "COMPLETING", "SIGNALING", "STAGE_OUT", "RESIZING"})
"""In these a job holds its nodes: what it waited for before, and its priority, are of the past."""


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
            return before + cut(reason, left) + after
    return cut("".join(forms[-1][:3]), room)


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


def format_steps(status: RunStatus) -> str:
    return "" if status.step is None else f"{status.step}/{status.total_steps or '?'}"


def cut(text: str, width: int) -> str:
    """At most `width` columns, the end left out."""
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
