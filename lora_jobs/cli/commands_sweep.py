"""The commands of sweeps: what `submit` shows of one, and `compare`."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads the annotations when it runs
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lora_jobs.cli.screen import print_json, say
from lora_jobs.errors import RunError, SpecError

if TYPE_CHECKING:
    from lora_jobs.runs import Sweep
    from lora_jobs.workflows.sweeping import SweepReport


def show_sent(sent: SweepReport, *, wait: bool, as_json: bool) -> None:
    """What was submitted (or would be); with `wait` the progress of every task and the ranking at the end."""
    from lora_jobs.cli import show_sweep

    if as_json:
        print_json(sent.to_json())
    else:
        show_sweep.show_submission(sent)
    if sent.sweep is not None and wait:
        _follow(sent.sweep, as_json=as_json)


def _follow(sweep: Sweep, *, as_json: bool) -> None:
    from lora_jobs.cli import show_compare, show_sweep
    from lora_jobs.workflows.comparing import compare_runs
    from lora_jobs.workflows.following import follow_sweep

    final = show_sweep.show_progress(sweep, follow_sweep(sweep), quiet=as_json)
    if not as_json:
        show_compare.show_comparison(compare_runs([sweep.name]))
    if any(status.state != "COMPLETED" for status in final.runs):
        raise typer.Exit(RunError.exit_code)


def cancel(job: str | None) -> bool:
    """Cancel the sweep that `job` means; False where it means none."""
    from lora_jobs.runs import find_runs_root, find_sweep
    from lora_jobs.workflows.following import cancel_sweep

    sweep = find_sweep(job, find_runs_root())
    if sweep is None:
        return False
    stopped = cancel_sweep(sweep)
    say(f"cancelled {len(stopped)} of {len(sweep.tasks)} runs of {sweep.name}; their checkpoints stay")
    say(f"next: lora-jobs status {sweep.name} · lora-jobs resume {sweep.name}")
    return True


def show_page(job: str, *, as_json: bool) -> bool:
    """The page of the sweep that `job` means: a row per task; False where it means none."""
    from lora_jobs.runs import find_runs_root, find_sweep

    sweep = find_sweep(job, find_runs_root())
    if sweep is None:
        return False
    from lora_jobs.cli import show_sweep
    from lora_jobs.workflows.observing import observe_runs

    report = observe_runs(sweep.runs)
    if as_json:
        values = {task.run: dict(task.values) for task in sweep.tasks}
        rows = [{**status.to_json(), "values": values[status.run]} for status in report.runs]
        print_json({**report.to_json(), "sweep": sweep.name, "directory": str(sweep.directory), "runs": rows})
    else:
        show_sweep.show_page(sweep, report)
    return True


def resume(job: str | None, *, plain: bool, dry_run: bool, force: bool, wait: bool, as_json: bool) -> bool:
    """Resume every stopped task of the sweep that `job` means; False where it means none. `plain`: no other options."""
    from lora_jobs.cli import show_sweep
    from lora_jobs.runs import find_runs_root, find_sweep
    from lora_jobs.workflows.resuming_sweep import plan_sweep_resume, resume_sweep

    sweep = find_sweep(job, find_runs_root())
    if sweep is None:
        return False
    if not plain:
        hint = f"lora-jobs resume {sweep.tasks[0].run} with these options"
        raise SpecError(
            f"{sweep.name} is a sweep: --set, --cluster, --from-scratch and --allow-drift are for one run", hint=hint
        )
    tasks = plan_sweep_resume(sweep)
    if not dry_run:
        tasks = resume_sweep(sweep, tasks, force=force)
    if as_json:
        print_json({"sweep": sweep.name, "dry_run": dry_run, "runs": [task.to_json() for task in tasks]})
    else:
        show_sweep.show_resumed(sweep, tasks)
    if any(task.problem for task in tasks):
        raise typer.Exit(RunError.exit_code)
    if wait and not dry_run:
        _follow(sweep, as_json=as_json)
    return True


def compare(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="sweeps, runs, job ids or the names of specs")],
    by: Annotated[
        Literal["eval_loss", "final_eval_loss", "loss", "tokens_per_second", "memory", "gpu_hours"] | None,
        typer.Option("--by", help="what ranks them; eval_loss is the best held-out loss"),
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="draw the loss curves as SVG")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout, nothing else")] = False,
) -> None:
    """Rank the runs of a sweep, or several runs: loss, memory, tokens/s, GPU-hours."""
    from lora_jobs.cli import show_compare
    from lora_jobs.workflows.comparing import compare_runs, draw_losses

    found = compare_runs(names, by=by)
    drawn = draw_losses(found, plot) if plot else None
    if as_json:
        print_json({**found.to_json(), "plot": str(drawn) if drawn else None})
        return
    show_compare.show_comparison(found)
    if drawn:
        show_compare.show_drawn(drawn)
