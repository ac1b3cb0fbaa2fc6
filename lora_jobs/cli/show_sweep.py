"""Sweeps to the screen: what is submitted, and its progress."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from lora_jobs.cli.screen import add_row, build_console, build_table, clean, say, warn
from lora_jobs.cli.show import warn_of_missing
from lora_jobs.cli.status_line import describe_status
from lora_jobs.spec import show_variant
from lora_jobs.units import format_gib
from lora_jobs.workflows.folding import fold_tasks

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.progress import TaskID

    from lora_jobs.runs import Sweep
    from lora_jobs.workflows.observing import RunStatus, StatusReport
    from lora_jobs.workflows.resuming_sweep import ResumedTask
    from lora_jobs.workflows.sweeping import CheckedVariant, SweepReport

MOST_ROWS = 20


def show_submission(sent: SweepReport) -> None:
    """The array's job id, every task with its memory, and the next commands; for a dry run also the script."""
    plan, gpu = sent.plan, sent.base.gpu
    if sent.submission is None:
        say(f"dry run: nothing was sent. {plan.name} would be {len(sent.tasks)} runs in {plan.directory}", "bold")
        sys.stdout.write(plan.script)
        say()
    elif plan.backend == "slurm":
        say(f"submitted {plan.name} to Slurm as array {sent.submission.job_id}: {len(sent.tasks)} runs", "bold green")
    else:
        at_once = sent.base.spec.resources.array_task_throttle or 1
        say(f"started {plan.name} on this machine: {len(sent.tasks)} runs, {at_once} at a time", "bold green")
    say(f"  {'memory':8} of {format_gib(gpu.usable_bytes)} usable on {gpu.name}")
    show_tasks([task.run_id for task in plan.tasks], sent.tasks)
    for task in sent.left_out:
        say(f"  left out: {show_variant(task.variant.values)} needs {format_gib(task.peak_bytes)}", "yellow")
    if sent.expected_start:
        say(f"  start    expected {sent.expected_start}")
    for warning in dict.fromkeys(text for task in sent.tasks for text in task.report.verdict.warnings):
        say(f"warning: {warning}", "yellow")
    warn_of_missing(sent.missing)
    if sent.submission is not None:
        say(f"  next     lora-jobs status {plan.name} · lora-jobs compare {plan.name} · lora-jobs cancel {plan.name}")


def show_tasks(names: Sequence[str], tasks: Sequence[CheckedVariant]) -> None:
    """A row per run: its values and its memory; of a long sweep the first ones, and what does not fit."""
    rows = list(zip(names, tasks, strict=True))
    shown = [row for number, row in enumerate(rows) if number < MOST_ROWS or not row[1].fits]
    table = build_table("", "", "", "", right=(2,))
    for name, task in shown[: 2 * MOST_ROWS]:
        fits = "fits" if task.fits else "does NOT fit"
        add_row(table, f"  {name}", show_variant(task.variant.values), format_gib(task.peak_bytes), fits)
    build_console().print(table)
    if len(rows) > len(shown[: 2 * MOST_ROWS]):
        say(f"  and {len(rows) - len(shown[: 2 * MOST_ROWS])} more")


def show_progress(sweep: Sweep, reports: Iterable[StatusReport], *, quiet: bool = False) -> StatusReport:
    """Follow a sweep to its end: a bar per running task on a terminal, a line per change elsewhere."""
    console = build_console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    values = {task.run: show_variant(task.values, short=True) for task in sweep.tasks}
    bars: dict[str, TaskID] = {}
    before: dict[str, str] = {}
    final: StatusReport | None = None
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:
        whole = progress.add_task(sweep.name, total=len(sweep.tasks), loss="")
        for report in reports:
            final = report
            for status in report.runs:
                _update_bar(progress, bars, status)
                if before.get(status.run) != status.state and not quiet:
                    line = f"{status.run} ({values[status.run]}): {describe_task(status)}"
                    progress.console.print(Text(clean(line)), soft_wrap=True)
                before[status.run] = status.state
            progress.update(whole, completed=sum(not status.active for status in report.runs))
    if final is None:
        raise AssertionError("a followed sweep yields its status first")
    for note in final.notes:
        warn(f"note: {note}")
    return final


def _update_bar(progress: Progress, bars: dict[str, TaskID], status: RunStatus) -> None:
    """A bar for a task that trains; none for one that waits or has ended."""
    if status.state != "RUNNING":
        if status.run in bars:
            progress.remove_task(bars.pop(status.run))
        return
    if status.run not in bars:
        bars[status.run] = progress.add_task(status.run, total=None, loss="")
    loss = "" if status.loss is None else f"loss {status.loss:.4f}"
    progress.update(bars[status.run], completed=status.step or 0, total=status.total_steps, loss=loss)


def describe_task(status: RunStatus) -> str:
    """One task's state in a line: completed at step 12, held-out loss 2.31."""
    words = [status.state.lower()]
    words += [f"step {status.step}"] if status.step is not None and not status.active else []
    words += [f"held-out loss {status.eval_loss:.4f}"] if status.eval_loss is not None and not status.active else []
    reason = status.reason_text or status.reason
    words += [reason] if reason and status.state != "COMPLETED" else []
    return ", ".join(words)


def show_page(sweep: Sweep, report: StatusReport) -> None:
    """Counts by state, then a row per task: its values, its job, its state and what matters in it."""
    row = fold_tasks(sweep.directory, report.runs)
    say(f"{sweep.name}{f' job {row.job_id}' if row.job_id else ''}: {row.explanation}", "bold")
    values = {task.run: show_variant(task.values, short=True) for task in sweep.tasks}
    table = build_table("RUN", "TRIED", "JOB", "STATE", "")
    for status in report.runs:
        style = "" if status.active or status.state == "COMPLETED" else "yellow"
        words = describe_status(status, datetime.now())
        add_row(table, status.run, values[status.run], status.job_id, status.state, words, style=style)
    build_console().print(table)
    for left in sweep.left_out:
        say(f"left out: {show_variant(left['values'])} needs {format_gib(left['peak_bytes'])}", "yellow")
    for note in report.notes:
        warn(f"note: {note}")
    if row.next_step:
        say(f"next: {row.next_step} · lora-jobs compare {sweep.name}")


def show_resumed(sweep: Sweep, tasks: Sequence[ResumedTask]) -> None:
    """Per task where it goes on and as which job, or why it can't."""
    for task in tasks:
        if task.plan is None or task.problem:
            say(f"{task.run}: {task.problem}", "bold red")
            continue
        start = f"{task.plan.chosen.name}, step {task.plan.step}" if task.plan.chosen else "the base model"
        job = f" as job {task.job_id}" if task.job_id else ""
        say(f"{task.run}: {task.plan.status.explanation}; goes on from {start}{job}")
    say(f"next: lora-jobs status {sweep.name}")
