"""Check, plan, preflight, submit: one YAML file to a job id."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

from lora_jobs import __version__
from lora_jobs.checkpoints import verify_checkpoint
from lora_jobs.cluster.client import cancel_job, check_submission
from lora_jobs.cluster.local import cancel_local
from lora_jobs.cluster.submission import submit_local, submit_slurm
from lora_jobs.errors import (
    ClusterError,
    DoesNotFitError,
    LoraJobsError,
    RunError,
    RunExistsError,
    SpecError,
    SubmissionError,
)
from lora_jobs.rendering import Plan, build_plan, render_checkout
from lora_jobs.runs import (
    Run,
    append_submission,
    create_run,
    discard_run,
    find_bad_nodes,
    find_runs_root,
    list_runs,
    load_attempts,
    next_run_id,
    write_atomic,
)
from lora_jobs.spec import JobSpec, load_spec
from lora_jobs.units import format_gib
from lora_jobs.workflows.checking import CheckReport, load_report
from lora_jobs.workflows.packages import find_missing_packages, refuse_missing_packages

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lora_jobs.errors import Problem
    from lora_jobs.runs import Submission

PACKAGES = ("torch", "transformers", "peft", "trl", "deepspeed", "accelerate", "bitsandbytes", "submitit")


class SubmitReport(Struct, frozen=True):
    """What was decided and, unless it was a dry run, what was sent."""

    report: CheckReport
    plan: Plan
    run: Run | None = None
    submission: Submission | None = None
    expected_start: str | None = None
    reused: bool = False
    missing: ClusterError | None = None
    """Of a dry run: what the job's environment lacks, for which `submit` would refuse."""

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.plan.run_id,
            "directory": str(self.plan.run_directory),
            "backend": self.plan.backend,
            "job_id": self.submission.job_id if self.submission else None,
            "expected_start": self.expected_start,
            "reused": self.reused,
            "dry_run": self.run is None,
            "missing_packages": self.missing.message if self.missing else None,
            "check": self.report.to_json(),
        }


def find_versions() -> dict[str, str | None]:
    """Versions of what a run depends on, as this interpreter has them; None where a package is not installed."""
    found: dict[str, str | None] = {"lora-jobs": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def plan_run(report: CheckReport, run_id: str, directory: Path) -> Plan:
    """Everything that would be sent for this run, decided; nothing done."""
    return build_plan(
        report.spec,
        report.environment,
        backend=report.backend,
        run_id=run_id,
        run_directory=directory,
        python=report.environment.python or sys.executable,
        estimate=report.verdict.to_json(),
        versions=find_versions(),
        exclude=find_bad_nodes(Run(directory)),
        more=render_provenance(report),
    )


def render_provenance(report: CheckReport) -> dict[str, str]:
    """git.json and git.diff of the checkout that the spec is in."""
    checkout = report.checkout
    return {} if checkout is None else render_checkout(checkout.to_json(), checkout.diff)


def plan_job(path: Path, overrides: Sequence[str], *, cluster: str = "auto") -> SubmitReport:
    """The very plan that `submit` would send."""
    return _plan(load_report(path, overrides, cluster))


def render_job(path: Path, overrides: Sequence[str]) -> SubmitReport:
    """The plan for the cluster that the spec names, whether or not Slurm is on this machine."""
    return _plan(load_report(path, overrides, "slurm"))


def _plan(report: CheckReport) -> SubmitReport:
    root = find_runs_root()
    run_id = next_run_id(root, report.spec.name)
    return SubmitReport(report, plan_run(report, run_id, (root / run_id).absolute()))


def refuse_unfit(report: CheckReport) -> None:
    """DoesNotFitError when the estimate is above what the device offers."""
    verdict = report.verdict
    if verdict.fits:
        return
    first = next((change for change in verdict.suggestions if change.fits), None)
    change = " ".join(f"--set {key}={json.dumps(value)}" for key, value in first.set.items()) if first else None
    raise DoesNotFitError(
        f"{report.spec.name} does not fit: {format_gib(verdict.estimate.peak_bytes)} needed, "
        f"{format_gib(report.gpu.usable_bytes)} usable on {report.gpu.name}",
        estimate=verdict.estimate,
        gpu=report.gpu,
        hint=f"this would fit: {change}" if change else "see `lora-jobs check`; --force submits in spite of it",
    )


def refuse_blockers(spec: JobSpec, blockers: Sequence[Problem]) -> None:
    """What `check` only warns of: data that is not there, an account that the cluster asks for."""
    if blockers:
        raise SpecError(f"the job {spec.name} can't be submitted yet", problems=blockers)


def find_finished_run(spec: JobSpec, root: Path) -> Run | None:
    """The newest run of this very spec whose adapter is whole, if there is one."""
    for run in list_runs(root):
        try:
            same = load_spec(run.spec_path) == spec
        except (OSError, LoraJobsError):
            continue
        if same and run.adapter.is_dir() and verify_checkpoint(run.adapter).good:
            return run
    return None


def submit_job(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    cluster: str = "auto",
    force: bool = False,
    dry_run: bool = False,
    reuse: bool = False,
) -> SubmitReport:
    """Check, plan, preflight and submit. Refusals leave nothing behind.

    Errors: SpecError, DoesNotFitError (unless `force`), SubmissionError, RunError.
    """
    planned = plan_job(path, overrides, cluster=cluster)
    report = planned.report
    if not force:
        refuse_unfit(report)
    if dry_run:
        return replace(planned, missing=find_missing_packages(report))
    if reuse and (finished := find_finished_run(report.spec, find_runs_root())) is not None:
        return SubmitReport(report, plan_run(report, finished.id, finished.directory), finished, reused=True)
    refuse_blockers(report.spec, report.blockers)
    refuse_missing_packages(report)
    plan, run = create_planned_run(report)
    return send(report, plan, run, discard=True)


def create_planned_run(report: CheckReport) -> tuple[Plan, Run]:
    """The run's directory with the plan's files; the next number when another submission took this one meanwhile."""
    while True:
        plan = _plan(report).plan
        try:
            return plan, create_run(find_runs_root(), plan.run_id, plan.files)
        except RunExistsError:
            continue


def send(report: CheckReport, plan: Plan, run: Run, *, discard: bool = False) -> SubmitReport:
    """Preflight and submit a plan whose files are written; the submission is recorded in the run.

    With `discard` a run that was refused leaves no directory behind. One that may be queued (Ctrl-C, or no answer
    in the middle of sbatch) keeps it: the job would need it.
    """
    expected_start = None
    before = max((attempt.number for attempt in load_attempts(run)), default=0)
    try:
        if plan.backend == "slurm":
            expected_start = preflight(run)
        submission = submit_slurm(plan, run) if plan.backend == "slurm" else submit_local(plan, run)
    except SubmissionError:
        if discard:
            discard_run(run)
        raise
    submission = replace(submission, after_attempt=before)
    record_submission(run, submission)
    return SubmitReport(report, plan, run, submission, expected_start)


def record_submission(run: Run, submission: Submission) -> None:
    """Write the job down. A job that nobody could find again is cancelled. Errors: RunError."""
    try:
        append_submission(run, submission)
    except RunError as error:
        try:
            cancel_job(submission.job_id) if submission.backend == "slurm" else cancel_local(run, force=True)
        except ClusterError:
            fate = f"job {submission.job_id} IS QUEUED: scancel {submission.job_id}"
        else:
            fate = f"job {submission.job_id} was cancelled again"
        raise RunError(f"{error.message}; {fate}", hint=error.hint) from error


def preflight(run: Run) -> str | None:
    """Ask Slurm whether it would take this very script; the start that it expects. Errors: SubmissionError."""
    return preflight_script(run.script_path)


def preflight_script(script: Path) -> str | None:
    """As `preflight`, of the script at this path."""
    try:
        test = check_submission(script)
    except ClusterError as error:
        raise SubmissionError(error.message, hint=error.hint) from error
    if not test.accepted:
        raise SubmissionError(f"sbatch refuses the job: {test.message}", hint=test.hint)
    return test.expected_start


def write_rendered(plan: Plan, directory: Path) -> tuple[Path, ...]:
    """The plan's script and DeepSpeed JSON as files of `directory`. Errors: RunError when it can't be written."""
    names = [name for name in ("script.sbatch", "deepspeed.json") if name in plan.files]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in names:
            write_atomic(directory / name, plan.files[name])
    except OSError as error:
        raise RunError(
            f"can't write to {directory}: {error.strerror}", hint="choose another directory with -o"
        ) from error
    return tuple(directory / name for name in names)
