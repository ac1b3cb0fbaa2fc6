"""Decisions to the screen: what a check found, what is submitted, what a resume goes on from."""

from __future__ import annotations

import json
import shlex
import sys
from typing import TYPE_CHECKING

from lora_jobs.cli.screen import add_row, build_console, build_table, say
from lora_jobs.cli.show_targets import show_targets
from lora_jobs.units import format_count, format_gib

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_jobs.checkpoints import CheckpointVerdict
    from lora_jobs.runs import Run
    from lora_jobs.sizing import Suggestion
    from lora_jobs.workflows.checking import CheckReport
    from lora_jobs.workflows.observing import RunStatus
    from lora_jobs.workflows.resuming import ResumePlan
    from lora_jobs.workflows.submitting import SubmitReport

BAR_WIDTH = 28


def show_check(report: CheckReport) -> None:
    """Parameters, the memory of the peak as a bar per component, the verdict, and what would make it fit."""
    verdict, estimate, resources = report.verdict, report.verdict.estimate, report.spec.resources
    devices = f"{resources.world_size} x {report.gpu.name}"
    say(f"{report.spec.name}: {report.spec.model.name_or_path} on {report.environment.name}, {devices}", "bold")
    base, trainable = verdict.parameters_base, verdict.parameters_trainable
    say(f"parameters: {format_count(base)} base, {format_count(trainable)} trainable ({trainable / base:.2%})")
    show_targets(report.spec)
    say()
    say(f"memory per process at its peak, {estimate.binding_instant}:")
    largest = max(estimate.components.values())
    table = build_table("", "", "", right=(1,))
    for name, size in sorted(estimate.components.items(), key=lambda item: -item[1]):
        if size:
            bar = "█" * max(1, round(BAR_WIDTH * size / largest))
            add_row(table, f"  {name.replace('_', ' ')}", format_gib(size), bar)
    build_console().print(table)
    say(f"  needed {format_gib(estimate.peak_bytes)} of {format_gib(report.gpu.usable_bytes)} usable", "bold")
    host, checkpoint = format_gib(estimate.host_memory_bytes), format_gib(estimate.checkpoint_bytes)
    say(f"host memory per node while loading {host}, one checkpoint {checkpoint}")
    _show_exact(report)
    say()
    spare = report.gpu.usable_bytes - (report.exact_peak_bytes or estimate.peak_bytes)
    if report.fits:
        say(f"FITS, {format_gib(spare)} to spare", "bold green")
    else:
        say(f"DOES NOT FIT, {format_gib(-spare)} too much", "bold red")
    _show_suggestions(verdict.suggestions)
    for warning in verdict.warnings:
        say(f"warning: {warning}", "yellow")


def _show_exact(report: CheckReport) -> None:
    """The trace beside the estimate, in allocated bytes."""
    if report.exact is None:
        return
    traced, estimated = report.exact.allocated_peak_bytes, report.verdict.estimate.allocated_peak_bytes
    instant = report.exact.binding.replace("_", " ")
    say(f"traced from the real training code: {format_gib(traced)} allocated at its peak ({instant}),")
    say(f"  the estimate says {format_gib(estimated)} ({estimated / traced - 1:+.2%})")


def _show_suggestions(suggestions: Iterable[Suggestion]) -> None:
    for change in suggestions:
        words = " ".join(f"--set {format_setting(key, value)}" for key, value in change.set.items())
        mark = "fits" if change.fits else "not enough alone"
        say(f"  {words}: {format_gib(change.peak_bytes)}, {mark}. {change.why}")


def format_setting(key: str, value: object) -> str:
    """`key=value` as --set takes it and a shell passes it on."""
    text = value if isinstance(value, str) else json.dumps(value)
    return shlex.quote(f"{key}={text}")


def show_submission(sent: SubmitReport) -> None:
    """The job id, the run directory and the next commands; for a dry run the plan itself."""
    plan = sent.plan
    estimate = sent.report.verdict.estimate
    if sent.run is None:
        say(f"dry run: nothing was sent. {plan.run_id} would run on {plan.backend}, in {plan.run_directory}", "bold")
        for name, text in plan.files.items():
            say(f"--- {name}", "dim")
            sys.stdout.write(text if text.endswith("\n") else text + "\n")
        return
    if sent.reused or sent.submission is None:
        say(f"{sent.run.id} has finished this very spec already; nothing was submitted")
        return
    where = "on this machine, as process" if plan.backend == "local" else "to Slurm as job"
    say(f"submitted {plan.run_id} {where} {sent.submission.job_id}", "bold green")
    usable = format_gib(sent.report.gpu.usable_bytes)
    say(f"  memory   {format_gib(estimate.peak_bytes)} estimated of {usable} on {sent.report.gpu.name}")
    if sent.expected_start:
        say(f"  start    expected {sent.expected_start}")
    say(f"  run      {sent.run.directory}")
    say(f"  next     lora-jobs status {plan.run_id} · lora-jobs logs {plan.run_id} -f · lora-jobs cancel {plan.run_id}")
    for warning in sent.report.verdict.warnings:
        say(f"warning: {warning}", "yellow")


def show_resume(plan: ResumePlan) -> None:
    """Why the run stopped, each checkpoint's verdict, and where it goes on."""
    say(
        f"{plan.run.id}: {plan.status.explanation}" + (f" ({plan.status.reason})" if plan.status.reason else ""), "bold"
    )
    if plan.finished:
        say(f"nothing to resume: the adapter is whole, {plan.run.adapter}")
        return
    show_verdicts(plan.verdicts)
    for change in plan.drift:
        say(f"  changed {change.key}: {change.stored} -> {change.present}")
    total = plan.status.total_steps
    if plan.chosen is None:
        say("goes on from the base model: " + ("asked for" if plan.verdicts else "no checkpoint was committed yet"))
    else:
        say(f"goes on from {plan.chosen.name}, at step {plan.step}" + (f" of {total}" if total else ""))


def explain_end(run: Run, status: RunStatus) -> str:
    """The run, what its state means, and the reason that was recorded."""
    return f"{run.id}: {status.explanation}" + (f" ({status.reason})" if status.reason else "")


def show_verdicts(verdicts: Iterable[CheckpointVerdict]) -> None:
    """One line a checkpoint: good, or not and why."""
    for verdict in verdicts:
        step = "" if verdict.step is None else f"step {verdict.step}, "
        word, style = ("good", "green") if verdict.good else ("BROKEN", "red")
        say(f"  {verdict.path.name}: {word}, {step}{verdict.reason}", style)
