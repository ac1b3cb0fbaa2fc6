"""Sweeps as one line: their tasks folded, counted by state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from lora_jobs.runs import group_by_sweep

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lora_jobs.runs import Run
    from lora_jobs.workflows.observing import RunStatus, StatusReport

# The state that a sweep is shown in: the first of these that a task is in, else any other that is alive, else any.
_FIRST = ("RUNNING", "COMPLETING", "CONFIGURING", "PENDING", "SUSPENDED", "REQUEUED")


def fold_sweeps(runs: Sequence[Run], report: StatusReport) -> StatusReport:
    """The report with one row for all runs of a sweep, where the first of them stood."""
    rows = {status.directory: status for status in report.runs if status.directory}
    folded: list[RunStatus] = []
    for key, members in group_by_sweep(runs).items():
        found = [rows.pop(str(run.directory)) for run in members if str(run.directory) in rows]
        if found:
            folded.append(found[0] if len(members) == 1 and members[0] == key else fold_tasks(key, found))  # type: ignore[arg-type]
    others = [status for status in report.runs if status.directory is None]
    return replace(report, runs=(*folded, *others))


def fold_tasks(directory: Path, tasks: Sequence[RunStatus]) -> RunStatus:
    """One row that stands for a sweep's tasks: counts by state, the first start, the best held-out loss."""
    counts: dict[str, int] = {}
    for status in tasks:
        counts[status.state] = counts.get(status.state, 0) + 1
    active = [status for status in tasks if status.active]
    front = min(tasks, key=_order)
    waiting = [status for status in active if status.rank is not None]
    evaluated = [status for status in tasks if status.eval_loss is not None and status.state == "COMPLETED"]
    best = min(evaluated, key=lambda status: status.eval_loss or 0.0, default=None)
    unfinished = any(status.state != "COMPLETED" for status in tasks)
    words = ", ".join(f"{number} {state.lower()}" for state, number in sorted(counts.items(), key=_by_state))
    if best is not None:
        words += f"; best held-out loss {best.eval_loss:.4f}, {best.run}"
    return replace(
        front,
        run=directory.name,
        sweep=directory.name,
        directory=str(directory),
        job_id=fold_ids([status.job_id for status in tasks if status.job_id and status.backend == "slurm"]),
        active=bool(active),
        explanation=words,
        next_step=f"lora-jobs resume {directory.name}" if unfinished and not active else None,
        rank=min((status.rank or 0 for status in waiting), default=None),
        step=sum(status.step or 0 for status in tasks),
        total_steps=None,
        loss=None,
        eval_loss=best.eval_loss if best else None,
        last_committed_step=None,
        attempts=sum(status.attempts for status in tasks),
        adapter=None,
        tasks=counts,
        remaining_seconds=None,
        expected_finish=None,
        tokens_per_second=None,
        memory_peak_bytes=max((status.memory_peak_bytes or 0 for status in tasks), default=0) or None,
        predicted_bytes=max((status.predicted_bytes or 0 for status in tasks), default=0) or None,
    )


def _order(status: RunStatus) -> tuple[int, int]:
    place = _FIRST.index(status.state) if status.state in _FIRST else len(_FIRST)
    return place, 0 if status.active else 2 if status.state == "COMPLETED" else 1


def _by_state(item: tuple[str, int]) -> tuple[int, int, str]:
    state = item[0]
    return (_FIRST.index(state) if state in _FIRST else len(_FIRST)), state != "COMPLETED", state


def fold_ids(ids: Sequence[str]) -> str | None:
    """The tasks' ids as Slurm writes them: 12345_[0-2,5], of several arrays the first; a single job as it is."""
    arrays: dict[str, list[int]] = {}
    for job_id in ids:
        base, _, task = job_id.partition("_")
        arrays.setdefault(base, []).extend([int(task)] if task.isdecimal() else [])
    tasks = [(base, sorted(numbers)) for base, numbers in arrays.items() if numbers]
    if not tasks:
        return ids[0] if ids else None
    base, numbers = max(tasks, key=lambda item: len(item[1]))
    return f"{base}_[{format_ranges(numbers)}]"


def format_ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, short: 0-3,7."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
