"""Where would it start, and end, sooner: every partition and number of GPUs, sized, timed, and asked of Slurm."""

from __future__ import annotations

import json
import math
import tempfile
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

from lora_jobs.cluster.client import check_submission
from lora_jobs.cluster.commands import find_command
from lora_jobs.errors import ClusterError, SpecError
from lora_jobs.runs import find_runs_root, next_run_id
from lora_jobs.sizing import find_shape, size_job
from lora_jobs.sizing.duration import Duration, Rows, count_work, estimate_duration
from lora_jobs.spec import (
    ClusterEnvironment,
    Document,
    JobSpec,
    find_data_problems,
    find_resource_problems,
    find_submission_problems,
    load_document,
    load_environment,
    replace_values,
)
from lora_jobs.units import format_duration, parse_duration
from lora_jobs.workflows.checking import CheckReport, anchor_paths, find_device
from lora_jobs.workflows.layouts import Layout, list_layouts
from lora_jobs.workflows.lengths import describe_basis, judge_lengths, load_rows
from lora_jobs.workflows.plan_rows import PlanRow, order_rows
from lora_jobs.workflows.speeds import Measured, measure_speeds
from lora_jobs.workflows.submitting import plan_run
from lora_jobs.workflows.timing import count_jobs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MAX_QUESTIONS = 32
"""Most rows that Slurm is asked about in one plan: each question is a try of its scheduler."""

TIME_MARGIN = 2
"""Times the expected duration that a shorter time limit is proposed with: the estimate is no promise."""

_AWAY = ("Slurm's controller", "Slurm can't tell")
"""How a refusal begins that is none: Slurm did not look at the job."""


class JobPlan(Struct, frozen=True):
    """Every row, the one that ends first at the top, and what could not be known."""

    spec: JobSpec
    environment: ClusterEnvironment
    rows: tuple[PlanRow, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.spec.name,
            "cluster": self.environment.name,
            "rows": [row.to_json() for row in self.rows],
            "notes": list(self.notes),
        }


def plan_spec(
    path: Path, overrides: Sequence[str] = (), *, progress: Callable[[int, int], None] | None = None
) -> JobPlan:
    """Size, time and ask for every layout of the spec's environment. Submits nothing. Errors: SpecError."""
    document = load_document(path, overrides)
    spec, environment = _prepare(document)
    notes = _check_data(document)
    train, evaluation = load_rows(spec)
    layouts, left_out = list_layouts(spec, environment)
    measured = measure_speeds(spec, find_runs_root(), notes)
    rows = [_size_row(spec, environment, layout, train, evaluation, measured) for layout in layouts]
    rows = [row for row in rows if not row.layout.only_if_whole or (row.duration and row.jobs == 1 and row.possible)]
    rows = _ask_starts(rows, environment, notes, progress)
    rows = sorted((row for row in rows if row.possible or not row.layout.only_if_whole), key=order_rows)
    notes += [*left_out, *_advise_time(rows)]
    if train is None and not spec.data.packing:
        notes.append("data.train can't be read here: rows of data.max_length tokens are assumed")
    if train is not None:
        notes.append(f"row lengths: {describe_basis(train)}")
    notes += judge_lengths(spec, (train, evaluation))
    account = find_submission_problems(spec.resources.model_copy(update={"gpu": None}), environment)
    notes += [f"before submitting: {problem.path}: {problem.message}" for problem in account]
    return JobPlan(spec, environment, tuple(rows), tuple(dict.fromkeys(notes)))


def _advise_time(rows: Sequence[PlanRow]) -> Iterator[str]:
    """A limit far above the expected duration keeps a job out of the gaps that backfill fills."""
    best = next((row for row in rows if row.possible and row.duration), None)
    if best is None or best.duration is None or best.report is None or best.report.backend == "local":
        return
    asked = parse_duration(best.spec.resources.time)
    enough = math.ceil(TIME_MARGIN * best.duration.seconds / 600) * 600 + best.spec.resume.signal_seconds
    if best.jobs == 1 and enough < asked / 2:
        needed = format_duration(best.duration.seconds)
        yield (
            f"{best.name} asks for {best.spec.resources.time} and needs about {needed}: "
            f"--set resources.time={format_duration(enough)} may start sooner (backfill takes short jobs first)"
        )


def find_row_overrides(path: Path, overrides: Sequence[str], name: str) -> list[str]:
    """The row of that name as `--set` values; they make `submit` send what `plan` asked about. Errors: SpecError."""
    spec, environment = _prepare(load_document(path, overrides))
    layouts, _ = list_layouts(spec, environment)
    for layout in layouts:
        if layout.name == name:
            return [f"{key}={json.dumps(value)}" for key, value in layout.settings.items()]
    raise SpecError(
        f"{spec.name} has no row {name!r} on {environment.name}",
        hint=f"rows are {', '.join(layout.name for layout in layouts)}; `lora-jobs plan {path}` compares them",
    )


def _prepare(document: Document[JobSpec]) -> tuple[JobSpec, ClusterEnvironment]:
    spec = anchor_paths(document.value)
    return spec.model_copy(update={"sweep": {}}), load_environment(spec.resources.cluster)


def _check_data(document: Document[JobSpec]) -> list[str]:
    """Missing files are notes, as for `check`; broken ones are SpecErrors."""
    data = document.value.data
    absent = {f"data.{key}" for key in ("train", "eval") if (name := getattr(data, key)) and not Path(name).exists()}
    problems = find_data_problems(data)
    if wrong := [problem for problem in problems if problem.path not in absent]:
        raise SpecError(f"the job {document.value.name} can't run as it is written", problems=document.place(wrong))
    notes = [f"before submitting: {problem.path}: {problem.message}" for problem in problems]
    if document.value.sweep:
        notes.append(f"the sweep over {', '.join(document.value.sweep)} is left out: the plan is for one variant")
    return notes


def _size_row(
    spec: JobSpec,
    environment: ClusterEnvironment,
    layout: Layout,
    train: Rows | None,
    evaluation: Rows | None,
    measured: dict[str, Measured],
) -> PlanRow:
    """The row without its start: memory, duration, and how many jobs it takes."""
    changed = replace_values(spec, layout.settings)
    row = PlanRow(layout, changed)
    problems = [
        f"{problem.path}: {problem.message}" for problem in find_resource_problems(changed.resources, environment)
    ]
    try:
        gpu = find_device(changed, environment)
    except SpecError as error:
        return replace(row, problems=(*problems, error.message))
    work = count_work(changed, train, evaluation)
    speed = measured.get(gpu.name)
    duration = None
    if work is not None:
        shape = find_shape(changed.model.name_or_path)
        per_gpu = speed.tokens_per_second if speed else None
        duration = estimate_duration(changed, shape, gpu, work, measured=per_gpu, runs=speed.runs if speed else "")
    report = CheckReport(changed, environment, environment.scheduler, gpu, size_job(changed, gpu, advise=False))
    row = replace(row, report=report, duration=duration, problems=tuple(problems))
    return row if duration is None or environment.scheduler == "local" else _split_by_limit(row, duration)


def _split_by_limit(row: PlanRow, duration: Duration) -> PlanRow:
    """A run longer than its time limit is several jobs, each with its own start."""
    start, jobs = duration.components["start"], count_jobs(row.spec, duration)
    if jobs is None:
        message = f"resources.time {row.spec.resources.time} leaves no time to train: loading takes {start:.0f} s"
        return replace(row, problems=(*row.problems, message))
    limit = row.spec.resume.max_attempts if row.spec.resume.auto else 1
    if jobs > limit:
        message = (
            f"about {format_duration(duration.seconds)} of work take {jobs} jobs of {row.spec.resources.time}, "
            f"resume allows {limit}"
        )
        return replace(row, jobs=jobs, problems=(*row.problems, message))
    longer = {**duration.components, "start": start * jobs}
    return replace(row, jobs=jobs, duration=replace(duration, components=longer))


def _ask_starts(
    rows: list[PlanRow],
    environment: ClusterEnvironment,
    notes: list[str],
    progress: Callable[[int, int], None] | None,
) -> list[PlanRow]:
    """The rows with Slurm's expected starts; where it can't be asked, or gives none, the row says so."""
    if environment.scheduler == "local":
        now = datetime.now().replace(microsecond=0).isoformat()
        return [replace(row, expected_start=now, start_note="at once") for row in rows]
    if find_command("sbatch") is None:
        notes.append("sbatch is not on PATH: no expected starts; sorted by duration")
        return [replace(row, start_note="sbatch is not here") for row in rows]
    asked = [row.name for row in rows if row.possible][:MAX_QUESTIONS]
    answered: list[PlanRow] = []
    away: str | None = None
    for row in rows:
        if row.report is None or row.name not in asked:
            note = f"not asked: {MAX_QUESTIONS} questions at once are enough" if row.possible else None
            answered.append(replace(row, start_note=note))
            continue
        if away is None:
            if progress is not None:
                progress(asked.index(row.name) + 1, len(asked))
            try:
                answered.append(_ask_start(row, row.report))
                continue
            except ClusterError as error:
                away = error.message
                notes.append(f"no expected starts: {away}")
        answered.append(replace(row, start_note="no answer from Slurm"))
    return answered


def _ask_start(row: PlanRow, report: CheckReport) -> PlanRow:
    """`sbatch --test-only` with the very script that `submit --plan` would send. Errors: ClusterError, no answer."""
    root = find_runs_root().absolute()
    run_id = next_run_id(root, row.spec.name)
    try:
        with tempfile.TemporaryDirectory(prefix="lora-jobs-plan-") as folder:
            script = Path(folder) / "script.sbatch"
            script.write_text(plan_run(report, run_id, root / run_id).script, encoding="utf-8")
            test = check_submission(script)
    except OSError as error:
        raise ClusterError(f"no script can be written to ask with: {error.strerror}") from error
    if not test.accepted and test.message.startswith(_AWAY):
        raise ClusterError(test.message, hint=test.hint)
    if not test.accepted:
        return replace(row, problems=(*row.problems, f"sbatch refuses it: {test.message}"))
    if test.expected_start is None:
        return replace(row, start_note="the scheduler gives no estimate")
    return replace(row, expected_start=test.expected_start)
