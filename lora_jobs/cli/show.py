"""Decisions to the screen: what is submitted, what a resume goes on from."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from lora_jobs.cli.screen import say, warn
from lora_jobs.units import format_gib

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_jobs.checkpoints import CheckpointVerdict
    from lora_jobs.errors import LoraJobsError
    from lora_jobs.runs import Run
    from lora_jobs.workflows.observing import RunStatus
    from lora_jobs.workflows.resuming import ResumePlan
    from lora_jobs.workflows.submitting import SubmitReport


def show_submission(sent: SubmitReport) -> None:
    """The job id, the run directory and the next commands; for a dry run the plan itself."""
    plan = sent.plan
    estimate = sent.report.verdict.estimate
    if sent.run is None:
        say(f"dry run: nothing was sent. {plan.run_id} would run on {plan.backend}, in {plan.run_directory}", "bold")
        for name, text in plan.files.items():
            say(f"--- {name}", "dim")
            sys.stdout.write(text if text.endswith("\n") else text + "\n")
        warn_of_missing(sent.missing)
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


def warn_of_missing(missing: LoraJobsError | None) -> None:
    """What a dry run found missing in the job's environment, and how to get it."""
    if missing is not None:
        warn(f"warning: before submitting: {missing.message}")
        warn(f"next: {missing.hint}", style="")


def show_resume(plan: ResumePlan) -> None:
    """Why the run stopped, each checkpoint's verdict, where it goes on, what is lost, what differs, the memory."""
    if plan.pending:
        say(f"{plan.run.id} is on its way already: job {plan.status.job_id} is {plan.status.state}", "bold")
        say(f"  next     lora-jobs status {plan.run.id} · lora-jobs why {plan.run.id}")
        return
    say(explain_end(plan.run, plan.status), "bold")
    if plan.finished:
        say(f"nothing to resume: the adapter is whole, {plan.run.adapter}")
        return
    if plan.diagnosis is not None:
        say(f"  cause    {plan.diagnosis.cause.meaning}: {plan.diagnosis.cause.advice}")
    show_verdicts(plan.verdicts)
    for change in plan.drift:
        say(f"  changed {change.key}: {change.stored} -> {change.present}")
    total = plan.status.total_steps
    if plan.chosen is None:
        say("goes on from the base model: " + ("asked for" if plan.verdicts else "no checkpoint was committed yet"))
    else:
        say(f"goes on from {plan.chosen.name}, at step {plan.step}" + (f" of {total}" if total else ""))
    if plan.lost.steps:
        say(f"  lost     {plan.lost.steps} step(s), {plan.lost.seconds / 60:.1f} minutes of training")
    for line in plan.inexact:
        say(f"  not bit-exact: {line}", "yellow")
    if plan.report is not None:
        need, usable = plan.report.verdict.estimate.peak_bytes, plan.report.gpu.usable_bytes
        word = "fits" if plan.report.verdict.fits else "DOES NOT FIT"
        say(f"  memory   {format_gib(need)} estimated of {format_gib(usable)} on {plan.report.gpu.name}: {word}")


def explain_end(run: Run, status: RunStatus) -> str:
    """The run, what its state means, and the reason: Slurm's in plain words, or the one that was recorded."""
    reason = status.reason_text or status.reason
    return f"{run.id}: {status.explanation}" + (f" ({reason})" if reason and reason != status.explanation else "")


def show_verdicts(verdicts: Iterable[CheckpointVerdict]) -> None:
    """One line a checkpoint: good, or not and why."""
    for verdict in verdicts:
        step = "" if verdict.step is None else f"step {verdict.step}, "
        word, style = ("good", "green") if verdict.good else ("BROKEN", "red")
        say(f"  {verdict.path.name}: {word}, {step}{verdict.reason}", style)
