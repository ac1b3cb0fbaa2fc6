"""A sweep: check every combination, write every run, submit them as one Slurm array (or one after another, here)."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import asdict, replace

from lora_jobs.cluster.arrays import DEFAULT_TASKS, find_array_limit, refuse_long_array, submit_array, submit_sequence
from lora_jobs.cluster.client import cancel_job
from lora_jobs.cluster.local import stop_launcher
from lora_jobs.cluster.submission import TASK_FILE, render_task
from lora_jobs.errors import (
    ClusterError,
    DoesNotFitError,
    Problem,
    RunError,
    RunExistsError,
    SpecError,
    SubmissionError,
)
from lora_jobs.rendering import ArrayPlan, build_array_plan
from lora_jobs.runs import (
    Sweep,
    Task,
    append_line,
    create_sweep,
    discard_sweep,
    find_runs_root,
    next_sweep_name,
    record_array,
)
from lora_jobs.spec import (
    Variant,
    count_variants,
    expand_sweep,
    find_data_problems,
    load_document,
    parse_sweep_option,
    show_variant,
)
from lora_jobs.units import format_gib
from lora_jobs.workflows.checking import CheckReport, check_spec, load_report
from lora_jobs.workflows.packages import find_missing_packages, refuse_missing_packages
from lora_jobs.workflows.submitting import (
    SubmitReport,
    find_versions,
    preflight_script,
    refuse_blockers,
    render_provenance,
    submit_job,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from types import FrameType

    from lora_jobs.runs import Submission
    from lora_jobs.spec import DataSpec
    from lora_jobs.workflows.checking import Reading

# What the estimate never looks at: variants that differ in these alone are sized once. Held by a test.
UNSIZED_KEYS = frozenset({
    "lora.lora_alpha", "lora.use_rslora", "training.learning_rate", "training.lr_scheduler_type",
    "training.warmup_ratio", "training.warmup_steps", "training.weight_decay", "training.adam_beta1",
    "training.adam_beta2", "training.adam_epsilon", "training.max_grad_norm", "training.logging_steps",
    "training.save_steps", "training.early_stopping_patience", "training.early_stopping_threshold", "training.seed",
})  # fmt: skip


class CheckedVariant(Struct, frozen=True):
    """One combination of the sweep and what `check` says of it."""

    variant: Variant
    report: CheckReport

    @property
    def fits(self) -> bool:
        return self.report.verdict.fits

    @property
    def peak_bytes(self) -> int:
        return self.report.verdict.estimate.peak_bytes


class SweepReport(Struct, frozen=True):
    """What was decided and, unless it was a dry run, what was sent. `left_out` did not fit."""

    base: CheckReport
    plan: ArrayPlan
    tasks: tuple[CheckedVariant, ...]
    left_out: tuple[CheckedVariant, ...] = ()
    sweep: Sweep | None = None
    submission: Submission | None = None
    expected_start: str | None = None
    missing: ClusterError | None = None
    """Of a dry run: what the jobs' environment lacks, for which `submit` would refuse."""

    def to_json(self) -> dict[str, Any]:
        return {
            "sweep": self.plan.name,
            "directory": str(self.plan.directory),
            "backend": self.plan.backend,
            "job_id": self.submission.job_id if self.submission else None,
            "expected_start": self.expected_start,
            "dry_run": self.sweep is None,
            "missing_packages": self.missing.message if self.missing else None,
            "tasks": [
                {"run": planned.run_id, **_describe(task)}
                for planned, task in zip(self.plan.tasks, self.tasks, strict=True)
            ],
            "left_out": [_describe(task) for task in self.left_out],
        }


def _describe(task: CheckedVariant) -> dict[str, Any]:
    return {"values": dict(task.variant.values), "fits": task.fits, "peak_bytes": task.peak_bytes}


def submit_spec(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    sweep: Sequence[str] = (),
    throttle: int | None = None,
    cluster: str = "auto",
    force: bool = False,
    skip_unfit: bool = False,
    dry_run: bool = False,
    reuse: bool = False,
) -> SubmitReport | SweepReport:
    """Submit one run, or a sweep where the file or `sweep` (KEY=VALUE,VALUE) asks for one."""
    settings = [*overrides, *(parse_sweep_option(text) for text in sweep)]
    if throttle is not None:
        settings.append(f"resources.array_task_throttle={throttle}")
    if not load_document(path, settings).value.sweep:
        if skip_unfit or throttle is not None:
            flag = "--skip-unfit" if skip_unfit else "--throttle"
            raise SpecError(f"{flag} is for sweeps, and {path} asks for none", hint="--sweep lora.r=8,16,32")
        return submit_job(path, settings, cluster=cluster, force=force, dry_run=dry_run, reuse=reuse)
    if reuse:
        raise SpecError("--reuse is for one run, and this is a sweep", hint="lora-jobs compare shows what it came to")
    return submit_sweep(path, settings, cluster=cluster, force=force, skip_unfit=skip_unfit, dry_run=dry_run)


def submit_sweep(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    cluster: str = "auto",
    force: bool = False,
    skip_unfit: bool = False,
    dry_run: bool = False,
) -> SweepReport:
    """Check every combination, then write and submit them together. Refusals leave nothing behind.

    Errors: SpecError; DoesNotFitError naming those that do not fit (unless `force` or `skip_unfit`); SubmissionError;
    RunError.
    """
    base = load_report(path, overrides, cluster)
    refuse_long_array(count_variants(base.spec), find_array_limit() if base.backend == "slurm" else DEFAULT_TASKS)
    checked = check_variants(base)
    left_out = tuple(each for each in checked if not each.fits) if skip_unfit and not force else ()
    tasks = tuple(each for each in checked if each not in left_out)
    if not dry_run:
        if not force:
            refuse_unfit_tasks(tasks or left_out, len(checked))
        refuse_blocked_tasks(tasks)
        refuse_missing_packages(tasks[0].report, *(task.variant.spec for task in tasks[1:]))
    shown = tasks or checked
    while True:
        plan = plan_sweep(base, shown)
        if dry_run:
            missing = find_missing_packages(shown[0].report, *(task.variant.spec for task in shown[1:]))
            return SweepReport(base, plan, shown, left_out, missing=missing)
        with contextlib.suppress(RunExistsError):
            return send_sweep(SweepReport(base, plan, tasks, left_out))


def check_variants(base: CheckReport) -> tuple[CheckedVariant, ...]:
    """What `check` says of every combination; those that differ in nothing it looks at are checked once."""
    seen: dict[tuple[tuple[str, Any], ...], CheckReport] = {}
    read = _read_once()
    checked = []
    for variant in expand_sweep(base.spec):
        key = tuple((name, value) for name, value in variant.values.items() if name not in UNSIZED_KEYS)
        if key not in seen:
            seen[key] = _check_variant(variant, base, read)
        checked.append(CheckedVariant(variant, replace(seen[key], spec=variant.spec)))
    return tuple(checked)


def _read_once() -> Reading:
    """What is wrong with the data, each file read once in a format, however many combinations train on it."""
    known: dict[tuple[str | None, ...], list[Problem]] = {}

    def read(data: DataSpec) -> list[Problem]:
        key = (data.dataset, data.train, data.eval, data.format)
        if key not in known:
            known[key] = find_data_problems(data)
        return known[key]

    return read


def _check_variant(variant: Variant, base: CheckReport, read: Reading) -> CheckReport:
    try:
        return check_spec(variant.spec, base.environment, base.backend, read=read)
    except SpecError as error:
        raise SpecError(
            f"{error.message} ({show_variant(variant.values)})", problems=error.problems, hint=error.hint
        ) from error


def refuse_unfit_tasks(tasks: Sequence[CheckedVariant], total: int) -> None:
    """DoesNotFitError that names every combination that does not fit, with its peak."""
    unfit = [task for task in tasks if not task.fits]
    if not unfit:
        return
    gpu = unfit[0].report.gpu
    problems = [Problem(show_variant(task.variant.values), f"{format_gib(task.peak_bytes)} needed") for task in unfit]
    if len(problems) > 20:
        problems[20:] = [Problem("", f"and {len(problems) - 20} more")]
    some = len(unfit) < total
    raise DoesNotFitError(
        f"{len(unfit)} of {total} do not fit, {format_gib(gpu.usable_bytes)} are usable on {gpu.name}",
        estimate=unfit[0].report.verdict.estimate,
        gpu=gpu,
        problems=problems,
        hint="--skip-unfit submits the others, --force all" if some else "--force submits them in spite of it",
    )


def refuse_blocked_tasks(tasks: Sequence[CheckedVariant]) -> None:
    """SpecError with what is missing for any combination; what only some lack names the first of these."""
    lacking: dict[Problem, list[CheckedVariant]] = {}
    for task in tasks:
        for problem in task.report.blockers:
            lacking.setdefault(problem, []).append(task)
    problems = []
    for problem, those in lacking.items():
        more = f" and {len(those) - 1} more" if len(those) > 1 else ""
        where = "" if len(those) == len(tasks) else f" ({show_variant(those[0].variant.values)}{more})"
        problems.append(problem._replace(message=problem.message + where))
    refuse_blockers(tasks[0].report.spec, problems)


def plan_sweep(base: CheckReport, tasks: Sequence[CheckedVariant]) -> ArrayPlan:
    """Everything that would be written and sent, decided; nothing done."""
    root = find_runs_root()
    name = next_sweep_name(root, base.spec.name)
    return build_array_plan(
        [(task.variant, task.report.verdict.to_json()) for task in tasks],
        base.environment,
        backend=base.backend,
        name=name,
        directory=(root / name).absolute(),
        python=base.environment.python or sys.executable,
        versions=find_versions(),
    )


def send_sweep(report: SweepReport) -> SweepReport:
    """Write the sweep and submit it. What was refused leaves nothing; Ctrl-C leaves nothing or a whole sweep.

    Where nobody knows whether the array was queued (no answer from sbatch) the sweep stays: its tasks would need it.
    """
    plan, spec = report.plan, report.base.spec
    sweep = Sweep(
        plan.directory,
        spec.name,
        tuple(spec.sweep),
        tuple(Task(task.run_id, task.values) for task in plan.tasks),
        spec.resources.array_task_throttle,
        tuple({"values": dict(each.variant.values), "peak_bytes": each.peak_bytes} for each in report.left_out),
    )
    shared = render_provenance(report.base)
    create_sweep(sweep, plan.script, _list_files(plan), shared)
    expected_start = None
    try:
        if plan.backend == "slurm":
            expected_start = preflight_script(sweep.script_path)
        with _hold_interrupts():
            submission = submit_array(sweep) if plan.backend == "slurm" else submit_sequence(sweep)
            _record(sweep, submission)
    except (SubmissionError, KeyboardInterrupt) as error:
        if isinstance(error, SubmissionError) or not sweep.submissions_path.exists():
            discard_sweep(sweep)
        raise
    return replace(report, sweep=sweep, submission=submission, expected_start=expected_start)


def _list_files(plan: ArrayPlan) -> dict[str, dict[str, str | bytes]]:
    """The files of every run; on Slurm also what submitit loads, since its job ids are not known yet."""
    files: dict[str, dict[str, str | bytes]] = {task.run_id: dict(task.files) for task in plan.tasks}
    if plan.backend == "slurm":
        for task in plan.tasks:
            files[task.run_id][TASK_FILE] = render_task(plan.directory / task.run_id, task.spec.resources.time)
    return files


@contextlib.contextmanager
def _hold_interrupts() -> Iterator[None]:
    """Ctrl-C waits until the block is done: between sbatch and the record of its answer it would lose the job's id.

    By a handler, not by a blocked signal, which another thread of the process would take.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = False

    def note(_number: int, _frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def _record(sweep: Sweep, submission: Submission) -> None:
    """Write the job down. An array that nobody could find again is cancelled. Errors: RunError."""
    try:
        if submission.backend == "slurm":
            record_array(sweep, submission)
        else:
            append_line(sweep.submissions_path, asdict(submission))
    except RunError as error:
        try:
            cancel_job(submission.job_id) if submission.backend == "slurm" else stop_launcher(submission)
        except ClusterError:
            fate = f"job {submission.job_id} IS QUEUED: scancel {submission.job_id}"
        else:
            fate = f"job {submission.job_id} was cancelled again"
        raise RunError(f"{error.message}; {fate}", hint=error.hint) from error
