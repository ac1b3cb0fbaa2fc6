"""Verify, choose, explain, continue: an interrupted run goes on from its newest good checkpoint, or says why not."""

from __future__ import annotations

import contextlib
import json
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field
from msgspec.structs import replace

from lora_jobs.checkpoints import (
    ALLOWED_FILE,
    MANIFEST,
    WORLD_KEYS,
    CheckpointVerdict,
    Drift,
    adopt_checkpoint,
    best_level,
    choose_checkpoint,
    find_drift,
    find_run_drift,
    list_allowed,
    list_checkpoints,
    list_failures,
    refuse_drift,
    require_own,
    verify_checkpoint,
)
from lora_jobs.cluster.client import requeue_job
from lora_jobs.errors import CheckpointError, ClusterError, LoraJobsError, RunError, SubmissionError
from lora_jobs.runs import (
    STARTED_OVER_FILE,
    Run,
    append_submission,
    find_run,
    find_runs_root,
    hold_run,
    list_committed_steps,
    load_attempts,
    load_submissions,
    render_started_over,
    write_atomic,
)
from lora_jobs.spec import JobSpec, load_environment, override_spec
from lora_jobs.workflows.checking import anchor_paths, check_spec, choose_backend
from lora_jobs.workflows.comparing_specs import (
    Loss,
    arrange_gpus,
    diagnose_status,
    list_inexact,
    measure_loss,
)
from lora_jobs.workflows.evidence import read_text
from lora_jobs.workflows.observing import RunStatus, load_stored_spec, observe_runs
from lora_jobs.workflows.packages import refuse_missing_packages
from lora_jobs.workflows.resuming_memory import advise_memory
from lora_jobs.workflows.submitting import (
    SubmitReport,
    plan_run,
    refuse_blockers,
    refuse_unfit,
    send,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from lora_jobs.checkpoints import Choice
    from lora_jobs.rendering import Plan
    from lora_jobs.runs import Diagnosis
    from lora_jobs.workflows.checking import CheckReport


DECIDING = frozenset({"spec.yaml", "script.sbatch", "deepspeed.json"})
WAITING = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"})


class ResumePlan(Struct, frozen=True):
    """Why the run stopped, which checkpoint it goes on from and why, and what differs from that checkpoint's spec."""

    run: Run
    status: RunStatus
    spec: JobSpec
    verdicts: tuple[CheckpointVerdict, ...]
    chosen: Path | None
    drift: tuple[Drift, ...]
    finished: bool
    """The adapter is whole, every byte of it: there is nothing to resume."""
    diagnosis: Diagnosis | None = None
    lost: Loss = field(default_factory=Loss)
    report: CheckReport | None = None
    """The memory, estimated once more; None where nothing would be started."""
    allowed: Mapping[str, Any] = field(default_factory=dict)
    """Drift that the user has allowed, now or before: dotted key to the value that it was allowed for."""
    pending: bool = False
    """A job of the run waits already: asking again starts no second one."""
    inexact: tuple[str, ...] = ()
    """What will not be bit for bit as in an uninterrupted run."""

    @property
    def step(self) -> int:
        """The step that training goes on from; 0 starts from the base model."""
        return next((verdict.step or 0 for verdict in self.verdicts if verdict.path == self.chosen), 0)

    def to_json(self) -> dict[str, Any]:
        verdict = self.report.verdict if self.report else None
        return {
            "run": self.run.id,
            "directory": str(self.run.directory),
            "state": self.status.state,
            "reason": self.status.reason,
            "diagnosis": self.diagnosis.to_json() if self.diagnosis else None,
            "finished": self.finished,
            "pending": self.pending,
            "job_id": self.status.job_id,
            "resume_from": self.chosen.name if self.chosen else None,
            "step": self.step,
            "lost_steps": self.lost.steps,
            "lost_seconds": self.lost.seconds,
            "checkpoints": [verdict.to_json() for verdict in self.verdicts],
            "drift": [change.to_json() for change in self.drift],
            "not_bit_exact": list(self.inexact),
            "memory": {"fits": verdict.fits, "peak_bytes": verdict.estimate.peak_bytes} if verdict else None,
        }


def plan_resume(
    job: str | None,
    overrides: Sequence[str] = (),
    *,
    allow_drift: Sequence[str] = (),
    from_scratch: bool = False,
    accept_unverified: bool = False,
    gpus: int | None = None,
    cluster: str | None = None,
    force: bool = False,
) -> ResumePlan:
    """Decide what `resume` would do. Nothing is changed. `accept_unverified` takes checkpoints without a manifest.

    Errors: RunNotFoundError; RunError when the run is still alive, its spec has drifted, or it would only end the
    same way again (unless `force`); CheckpointError when checkpoints exist and none of them is good.
    """
    run = find_run(job, find_runs_root())
    refuse_foreign(run)
    stored = load_stored_spec(run)
    spec = anchor_paths(override_spec(stored, [*overrides, *arrange_gpus(stored, gpus)]))
    status = observe_runs([run], ranked=False).runs[0]
    if status.state in WAITING:
        return ResumePlan(run, status, stored, (), None, (), finished=False, pending=True)
    refuse_active(run, status)
    finished = run.adapter.is_dir() and verify_checkpoint(run.adapter).good
    choice = choose_checkpoint(run.checkpoints, level=best_level(), accept_unverified=accept_unverified)
    chosen = None if from_scratch else choice.chosen
    drift = tuple(find_run_drift(run, choice.chosen, spec))
    changed = bool(find_drift(stored, spec))
    if finished and (from_scratch or changed):
        raise RunError(
            f"{run.id} is finished: its adapter stays as it is",
            hint="submit the changed spec, or the same one again, as a new run",
        )
    allowed = list_allowed(run, drift, [*allow_drift, *(WORLD_KEYS if gpus is not None else ())])
    refuse_drift(drift, allowed)
    if finished:
        return ResumePlan(run, status, spec, choice.verdicts, chosen, drift, finished=True)
    diagnosis = diagnose_status(run, status)
    if not (changed or force):
        _refuse_repetition(run, diagnosis, partial(check_resume, spec, status, cluster))
    if chosen is None and not from_scratch:
        _refuse_loss(run, choice)
    return ResumePlan(
        run,
        status,
        spec,
        choice.verdicts,
        chosen,
        drift,
        finished=False,
        diagnosis=diagnosis,
        lost=measure_loss(run, chosen),
        report=check_resume(spec, status, cluster),
        allowed=allowed,
        inexact=list_inexact(stored, spec) if gpus is not None and chosen is not None else (),
    )


def _refuse_repetition(run: Run, diagnosis: Diagnosis | None, check: Callable[[], CheckReport]) -> None:
    """Raises RunError where what ended the run would end it again; for the GPU's memory with the estimator's advice."""
    if diagnosis is None or diagnosis.cause.policy != "refuse" or diagnosis.cause.name == "no_checkpoint":
        return  # what the checkpoints are worth now is looked at by itself
    advice = diagnosis.cause.advice
    if diagnosis.cause.name == "gpu_memory":
        with contextlib.suppress(LoraJobsError):  # a model that can't be estimated: the advice of the table stays
            change = advise_memory(check())
            advice = f"lora-jobs resume {run.id} {change}" if change is not None else advice
    raise RunError(
        f"{run.id} would end the same way again: {diagnosis.cause.meaning}"
        + (f" ({diagnosis.evidence})" if diagnosis.evidence else ""),
        hint=f"{advice}; --force tries it unchanged",
    )


def _refuse_loss(run: Run, choice: Choice) -> None:
    """Raises CheckpointError where there are folders of checkpoints, or were, and none of them is good."""
    failures = list_failures(choice, run.checkpoints, known=list_committed_steps(run))
    failures = failures or [f"{verdict.path.name}: {verdict.reason}" for verdict in choice.verdicts]
    if failures:
        raise CheckpointError(
            f"none of the checkpoints of {run.id} is good: {'; '.join(failures)}",
            path=run.checkpoints,
            hint=f"lora-jobs resume {run.id} --from-scratch starts over from the base model",
        )


def check_resume(spec: JobSpec, status: RunStatus, cluster: str | None) -> CheckReport:
    """The memory and the cluster's limits, checked again; on the backend that the run had, unless one is named."""
    backend = status.backend if cluster in (None, "auto") else cluster
    environment = load_environment("local" if backend == "local" else spec.resources.cluster)
    return check_spec(spec, environment, choose_backend(environment, backend or "auto"))


def refuse_foreign(run: Run) -> None:
    """Resuming unpickles what is in the directory: it has to be the user's own."""
    require_own(run.directory.resolve(), run.checkpoints)


def refuse_active(run: Run, status: RunStatus) -> None:
    """Two writers would break a run; one that nobody can ask about may still be written."""
    if status.state == "UNREACHABLE":
        raise ClusterError(f"can't tell whether {run.id} still runs: {status.reason}", hint="try again in a minute")
    if status.active:
        raise RunError(
            f"{run.id} is still {status.state} as job {status.job_id}: two writers would break it",
            hint=f"lora-jobs status {run.id} shows it; lora-jobs cancel {run.id} stops it",
        )


def resume_run(plan: ResumePlan, *, cluster: str | None = None, force: bool = False) -> SubmitReport:
    """Start the run again, in its own directory; the job side verifies once more and goes on.

    The job that Slurm still knows goes back into the queue under its id where nothing has changed; else a new job.
    """
    report = plan.report or check_resume(plan.spec, plan.status, cluster)
    if not force:
        refuse_unfit(report)
    refuse_blockers(report.spec, report.blockers)
    refuse_missing_packages(report)
    new = plan_run(report, plan.run.id, plan.run.directory)
    same = all(read_text(plan.run.directory / name) == text for name, text in new.files.items() if name in DECIDING)
    files = {**new.files, ALLOWED_FILE: json.dumps(dict(plan.allowed), indent=2) + "\n"}
    with hold_run(plan.run):
        refuse_active(plan.run, observe_runs([plan.run], ranked=False).runs[0])
        if plan.chosen is not None and not (plan.chosen / MANIFEST).exists():
            adopt_checkpoint(plan.chosen)
        undo = change_run(plan.run, files, start_over=plan.chosen is None)
        try:
            return (requeue(report, new, plan) if same else None) or send(report, new, plan.run)
        except SubmissionError:
            undo()
            raise


def requeue(report: CheckReport, new: Plan, plan: ResumePlan) -> SubmitReport | None:
    """The run's last job back in the queue; None where Slurm no longer knows it, or does not want to."""
    last = load_submissions(plan.run)[-1:]
    if new.backend != "slurm" or not last or last[0].backend != "slurm":
        return None
    attempts = load_attempts(plan.run)
    try:
        requeue_job(last[0].job_id)
    except ClusterError:
        return None
    number = max((attempt.number for attempt in attempts), default=0)
    submission = replace(last[0], submitted_at=time.time(), after_attempt=number)
    append_submission(plan.run, submission)
    return SubmitReport(report, new, plan.run, submission)


def change_run(run: Run, files: Mapping[str, str], *, start_over: bool) -> Callable[[], None]:
    """Write the new plan's files; starting over sets the checkpoints aside. Returns what takes both back.

    A refused resume must leave the run as it was: else the next one would find other settings, or no checkpoints.
    """
    if start_over:
        files = {**files, STARTED_OVER_FILE: render_started_over(run)}
    before = {name: path.read_bytes() if (path := run.directory / name).exists() else None for name in files}
    aside = set_aside_checkpoints(run) if start_over else None
    for name, text in files.items():
        write_atomic(run.directory / name, text)

    def undo() -> None:
        for name, data in before.items():
            if data is None:
                (run.directory / name).unlink()
            else:
                write_atomic(run.directory / name, data)
        if aside is not None:
            run.checkpoints.rmdir()
            aside.rename(run.checkpoints)

    return undo


def set_aside_checkpoints(run: Run) -> Path | None:
    """What is in checkpoints/ is kept under another name, which is returned; never deleted."""
    if not list_checkpoints(run.checkpoints):
        return None
    number = 1
    while (aside := run.directory / f"checkpoints-set-aside-{number}").exists():
        number += 1
    run.checkpoints.rename(aside)
    run.checkpoints.mkdir(mode=0o700)
    return aside
