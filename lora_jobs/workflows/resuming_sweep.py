"""Resuming a whole sweep: every task that stopped early goes on, each by itself, as `resume RUN` would do it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import asdict

from lora_jobs.cluster.arrays import submit_sequence
from lora_jobs.errors import LoraJobsError, RunError
from lora_jobs.runs import append_line
from lora_jobs.workflows.observing import observe_runs
from lora_jobs.workflows.resuming import ResumePlan, plan_resume, resume_run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_jobs.runs import Sweep
    from lora_jobs.workflows.observing import RunStatus


class ResumedTask(Struct, frozen=True):
    """One task: its plan and its new job's id, or why it can't go on."""

    run: str
    plan: ResumePlan | None = None
    job_id: str | None = None
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        planned = {} if self.plan is None else self.plan.to_json()
        return {"run": self.run, **planned, "job_id": self.job_id, "problem": self.problem}


def plan_sweep_resume(sweep: Sweep) -> tuple[ResumedTask, ...]:
    """What each stopped task would go on from; one that can't has its problem. Errors: RunError when none stopped."""
    statuses = observe_runs(sweep.runs, ranked=False).runs
    stopped = [status for status in statuses if not status.active and status.state != "COMPLETED"]
    if not stopped:
        alive = sum(status.active for status in statuses)
        words = f"{alive} still run or wait" if alive else "all are finished"
        raise RunError(f"nothing of {sweep.name} to resume: {words}", hint=f"lora-jobs status {sweep.name} shows them")
    return tuple(_plan_task(sweep, status) for status in stopped)


def _plan_task(sweep: Sweep, status: RunStatus) -> ResumedTask:
    try:
        plan = plan_resume(str(sweep.directory / status.run))
    except LoraJobsError as error:
        return ResumedTask(status.run, problem=error.message)
    return ResumedTask(status.run, plan)


def resume_sweep(sweep: Sweep, planned: Sequence[ResumedTask], *, force: bool = False) -> tuple[ResumedTask, ...]:
    """Submit what can go on: on Slurm a job each, on this machine one after another. Errors: as `resume_run`."""
    ready = [task for task in planned if task.plan is not None and not task.plan.finished]
    local = [task for task in ready if task.plan is not None and task.plan.status.backend in ("local", None)]
    done: dict[str, ResumedTask] = {}
    if local:
        submission = submit_sequence(sweep, only=[task.run for task in local])
        append_line(sweep.submissions_path, asdict(submission))
        done |= {task.run: ResumedTask(task.run, task.plan, submission.job_id) for task in local}
    for task in ready:
        if task not in local and task.plan is not None:
            done[task.run] = _resume_task(task, task.plan, force=force)
    return tuple(done.get(task.run, task) for task in planned)


def _resume_task(task: ResumedTask, plan: ResumePlan, *, force: bool) -> ResumedTask:
    try:
        sent = resume_run(plan, force=force)
    except LoraJobsError as error:
        return ResumedTask(task.run, plan, problem=error.message)
    return ResumedTask(task.run, plan, sent.submission.job_id if sent.submission else None)
