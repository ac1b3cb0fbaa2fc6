"""The progress of a run that goes on, and how it ended."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from lora_jobs.cli.screen import build_console, clean, say
from lora_jobs.cli.show import explain_end
from lora_jobs.cli.status_line import format_result
from lora_jobs.workflows.observing import RunStatus

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_jobs.runs import Run
    from lora_jobs.workflows.results import Outcome


def _number(value: float | None) -> str:
    """Four digits; a record holds null where the number was NaN or infinite."""
    return "not a finite number" if value is None else f"{value:.4f}"


def _perplexity(loss: float | None) -> str:
    """exp of the loss per token."""
    return "not a finite number" if loss is None or loss > 700 else f"{math.exp(loss):.2f}"


def show_progress(events: Iterable[RunStatus | dict[str, Any]], *, quiet: bool = False) -> RunStatus:
    """Follow a run to its end: a bar on a terminal, plain lines elsewhere. Returns the last status."""
    console = build_console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    final: RunStatus | None = None
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("waiting", total=None, loss="")
        for event in events:
            if isinstance(event, RunStatus):
                final = event
                progress.update(task, description=event.state.lower(), total=event.total_steps)
                if not quiet:
                    words = f"{event.run}: {event.state.lower()} {event.reason_text or event.reason or ''}"
                    progress.console.print(Text(clean(words.rstrip())), soft_wrap=True)
                continue
            if "max_steps" in event:
                progress.update(task, total=event["max_steps"])
            if event.get("kind") == "train" and "loss" in event:
                progress.update(task, completed=event["step"], loss=f"loss {_number(event['loss'])}")
            line = _describe(event, progress.tasks[0].total)
            if line and not quiet and not (console.is_terminal and event.get("kind") == "train"):
                progress.console.print(Text(clean(line)), soft_wrap=True)
    if final is None:
        raise AssertionError("a followed run yields its status first")
    return final


def _describe(event: dict[str, Any], total: float | None) -> str | None:
    """One plain line of a metrics record; None for what a waiting user need not read."""
    step = f"step {event.get('step')}" + (f"/{total:.0f}" if total else "")
    if event.get("kind") == "train" and "loss" in event:
        rate = event.get("tokens_per_second")
        return f"{step}  loss {_number(event['loss'])}" + (f"  {rate:.0f} tokens/s" if rate else "")
    if event.get("kind") == "eval":
        return f"{step}  held-out loss {_number(event['eval_loss'])}"
    return None


def show_outcome(run: Run, status: RunStatus, outcome: Outcome) -> None:
    """How the run ended: held-out loss before and after, the adapter, a caption with and without it."""
    say()
    if status.state != "COMPLETED":
        say(explain_end(run, status), "bold red")
        say(f"next: lora-jobs logs {run.id} · {status.next_step or ''}")
        return
    say(f"{run.id} finished: {status.total_steps or status.step} steps, {status.attempts} attempt(s)", "bold green")
    if outcome.losses is not None:
        before, after = outcome.losses
        say(f"  held-out loss   {_number(before)} before, {_number(after)} after")
        say(f"  perplexity      {_perplexity(before)} before, {_perplexity(after)} after")
    if outcome.results:
        said = [f"{result.name.replace('_', ' ')} {format_result(result)}" for result in outcome.results]
        say(f"  final           {'; '.join(said)}")
    if (sample := outcome.sample) is not None:
        say(f"  wanted answer   {_shorten(sample.get('expected', ''))}")
        say(f"  without adapter {_shorten(sample.get('without_adapter', ''))}")
        say(f"  with adapter    {_shorten(sample.get('with_adapter', ''))}")
    say(f"  adapter         {run.adapter}")


def _shorten(text: str, width: int = 160) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= width else line[: width - 1] + "…"
