"""Verify, choose, explain, continue: an interrupted run goes on from its newest good checkpoint, or says why not."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_jobs.checkpoints import (
    CheckpointVerdict,
    Drift,
    choose_checkpoint,
    find_drift,
    list_checkpoints,
    verify_checkpoint,
)
from lora_jobs.errors import CheckpointError, ClusterError, RunError, SubmissionError
from lora_jobs.runs import Run, find_run, find_runs_root, hold_run, write_atomic
from lora_jobs.spec import JobSpec, load_environment, override_spec
from lora_jobs.workflows.checking import anchor_paths, check_spec, choose_backend
from lora_jobs.workflows.observing import RunStatus, load_stored_spec, observe_runs
from lora_jobs.workflows.packages import refuse_missing_packages
from lora_jobs.workflows.submitting import (
    SubmitReport,
    plan_run,
    refuse_blockers,
    refuse_unfit,
    send,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass(frozen=True, slots=True)
class ResumePlan:
    """Why the run stopped, which checkpoint it goes on from and why, and what differs from the stored spec."""

    run: Run
    status: RunStatus
    spec: JobSpec
    verdicts: tuple[CheckpointVerdict, ...]
    chosen: Path | None
    drift: tuple[Drift, ...]
    finished: bool
    """The adapter is whole, every byte of it: there is nothing to resume."""

    @property
    def step(self) -> int:
        """The step that training goes on from; 0 starts from the base model."""
        return next((verdict.step or 0 for verdict in self.verdicts if verdict.path == self.chosen), 0)

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.run.id,
            "directory": str(self.run.directory),
            "state": self.status.state,
            "reason": self.status.reason,
            "finished": self.finished,
            "resume_from": self.chosen.name if self.chosen else None,
            "step": self.step,
            "checkpoints": [verdict.to_json() for verdict in self.verdicts],
            "drift": [change.to_json() for change in self.drift],
        }


def plan_resume(
    job: str | None,
    overrides: Sequence[str] = (),
    *,
    allow_drift: Sequence[str] = (),
    from_scratch: bool = False,
) -> ResumePlan:
    """Decide what `resume` would do. Nothing is changed.

    Errors: RunNotFoundError; RunError when the run is still alive or the spec has drifted; CheckpointError when
    checkpoints exist and none of them is good.
    """
    run = find_run(job, find_runs_root())
    refuse_foreign(run)
    stored = load_stored_spec(run)
    spec = anchor_paths(override_spec(stored, overrides))
    drift = tuple(find_drift(stored, spec))
    status = observe_runs([run], ranked=False).runs[0]
    refuse_active(run, status)
    finished = run.adapter.is_dir() and verify_checkpoint(run.adapter).good
    if finished and (from_scratch or drift):
        raise RunError(
            f"{run.id} is finished: its adapter stays as it is",
            hint="submit the changed spec, or the same one again, as a new run",
        )
    refuse_drift(drift, allow_drift)
    choice = choose_checkpoint(run.checkpoints)
    chosen = None if from_scratch else choice.chosen
    if chosen is None and choice.verdicts and not from_scratch and not finished:
        worst = "; ".join(f"{verdict.path.name}: {verdict.reason}" for verdict in choice.verdicts)
        raise CheckpointError(
            f"none of the {len(choice.verdicts)} checkpoint(s) of {run.id} is good: {worst}",
            path=run.checkpoints,
            hint=f"lora-jobs resume {run.id} --from-scratch starts over from the base model",
        )
    return ResumePlan(run, status, spec, choice.verdicts, chosen, drift, finished)


def refuse_foreign(run: Run) -> None:
    """Resuming unpickles what is in the directory: it has to be the user's own."""
    if run.directory.stat().st_uid != os.geteuid():
        raise RunError(
            f"{run.directory} belongs to another user", hint="copy its spec.yaml and submit a run of your own"
        )


def refuse_active(run: Run, status: RunStatus) -> None:
    """Two writers would break a run; one that nobody can ask about may still be written."""
    if status.state == "UNREACHABLE":
        raise ClusterError(f"can't tell whether {run.id} still runs: {status.reason}", hint="try again in a minute")
    if status.active:
        raise RunError(
            f"{run.id} is still {status.state} as job {status.job_id}: two writers would break it",
            hint=f"lora-jobs status {run.id} shows it; lora-jobs cancel {run.id} stops it",
        )


def refuse_drift(drift: Sequence[Drift], allowed: Sequence[str]) -> None:
    """RunError where a changed key would train something else than the checkpoint holds."""
    forbidden = [change for change in drift if change.kind == "forbidden"]
    asking = [change for change in drift if change.kind == "allowed_with_flag" and change.key not in allowed]
    if forbidden:
        keys = "; ".join(f"{c.key}: checkpoint has {c.stored}, now {c.present}" for c in forbidden)
        raise RunError(f"the checkpoint does not match the spec: {keys}", hint="submit this as a new run")
    if asking:
        keys = "; ".join(f"{c.key}: was {c.stored}, now {c.present}" for c in asking)
        flags = " ".join(f"--allow-drift {c.key}" for c in asking)
        raise RunError(f"this changes how the run trains on: {keys}", hint=f"if that is meant: {flags}")


def resume_run(plan: ResumePlan, *, cluster: str | None = None, force: bool = False) -> SubmitReport:
    """Submit the run again, in its own directory; the job side verifies once more and goes on.

    The backend is the one that the run had, unless `cluster` names another.
    """
    backend = plan.status.backend if cluster in (None, "auto") else cluster
    environment = load_environment("local" if backend == "local" else plan.spec.resources.cluster)
    report = check_spec(plan.spec, environment, choose_backend(environment, backend or "auto"))
    if not force:
        refuse_unfit(report)
    refuse_blockers(report)
    refuse_missing_packages(report)
    new = plan_run(report, plan.run.id, plan.run.directory)
    with hold_run(plan.run):
        refuse_active(plan.run, observe_runs([plan.run], ranked=False).runs[0])
        undo = change_run(plan.run, new.files, start_over=plan.chosen is None)
        try:
            return send(report, new, plan.run)
        except SubmissionError:
            undo()
            raise


def change_run(run: Run, files: Mapping[str, str], *, start_over: bool) -> Callable[[], None]:
    """Write the new plan's files; starting over sets the checkpoints aside. Returns what takes both back.

    A refused resume must leave the run as it was: else the next one would find other settings, or no checkpoints.
    """
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


def verify_path_or_run(target: str | None, *, level: int = 2) -> tuple[CheckpointVerdict, ...]:
    """A verdict per checkpoint, newest first (and the finished adapter), of a run or of one directory.

    Errors: RunNotFoundError when it is neither; CheckpointError when there is nothing to verify.
    """
    path = Path(target) if target else None
    if path is not None and path.is_dir() and not (path / "spec.yaml").exists():
        directories = list_checkpoints(path) or [path]
    else:
        run = find_run(target, find_runs_root())
        directories = [*([run.adapter] if run.adapter.is_dir() else []), *list_checkpoints(run.checkpoints)]
        if not directories:
            raise CheckpointError(
                f"{run.id} has no checkpoint yet",
                path=run.checkpoints,
                hint="one is committed every training.save_steps steps and at a signal",
            )
    return tuple(verify_checkpoint(directory, level=level) for directory in directories)
