"""Check one spec: the cluster's limits, the data, the memory; nothing is written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct
from msgspec.structs import asdict, replace

from lora_jobs.cluster.checkout import Checkout, read_checkout
from lora_jobs.cluster.commands import find_command, run_command
from lora_jobs.cluster.local import detect_device
from lora_jobs.errors import Problem, SpecError
from lora_jobs.runs import find_runs_root, load_constants
from lora_jobs.runs.constants import FEWEST_RUNS
from lora_jobs.sizing import (
    Elsewhere,
    Gpu,
    Verdict,
    calibrate_gpu,
    cpu_device,
    detected_gpu,
    find_gpu,
    list_common_cards,
    size_job,
)
from lora_jobs.sizing.margins import Word, cautious_bytes, choose_verdict, required_bytes
from lora_jobs.sizing.models import UnknownModelError
from lora_jobs.sizing.traced import ALLOCATED, TracedModel, size_traced
from lora_jobs.spec import (
    ClusterEnvironment,
    DataSpec,
    JobSpec,
    find_data_problems,
    find_resource_problems,
    find_submission_problems,
    find_unused_resources,
    load_document,
    load_environment,
    replace_values,
)
from lora_jobs.workflows.costing import Costs, estimate_costs
from lora_jobs.workflows.fetching import find_unfetched, name_fetched_model
from lora_jobs.workflows.layouts import list_layouts
from lora_jobs.workflows.lengths import load_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Backend = Literal["slurm", "local"]
Placing = Callable[["Sequence[Problem]"], "tuple[Problem, ...]"]
Reading = Callable[["DataSpec"], "list[Problem]"]


TRACE_SECONDS = 1800.0
"""The longest that a trace may take; a table model takes 10 to 30 seconds, the first time a minute more."""


class Exact(Struct, frozen=True):
    """What a trace of the real training code allocates at its peak, in bytes, and at which instant."""

    allocated_peak_bytes: int
    instants: dict[str, int]
    versions: dict[str, str]
    parameters: dict[str, int]
    """Of the base model and trained, and the bytes of the trained."""

    @property
    def binding(self) -> str:
        """Name of the instant of the peak."""
        return max(self.instants, key=self.instants.__getitem__)


class CheckReport(Struct, frozen=True):
    """What `check` found: the spec, where it would run, and whether it fits there."""

    spec: JobSpec
    environment: ClusterEnvironment
    backend: Backend
    gpu: Gpu
    verdict: Verdict
    blockers: tuple[Problem, ...] = ()
    exact: Exact | None = None
    costs: Costs | None = None
    checkout: Checkout | None = None
    """What a submission is from; `check` itself does not look."""

    @property
    def is_estimated(self) -> bool:
        """Whether the verdict is the closed form's; else a trace alone gave every figure."""
        return ALLOCATED not in self.verdict.estimate.components

    @property
    def allocated_peak_bytes(self) -> int:
        """By the trace where there is one; it begins after loading, which the estimate alone knows."""
        estimate = self.verdict.estimate
        if self.exact is None:
            return estimate.allocated_peak_bytes
        return max(self.exact.allocated_peak_bytes, estimate.untraced_peak_bytes)

    @property
    def word(self) -> Word:
        """By the trace where there is one, else by the estimate."""
        if self.exact is None:
            return self.verdict.word
        allocated = self.allocated_peak_bytes
        peaks = required_bytes(self.spec, self.gpu, allocated), cautious_bytes(self.spec, self.gpu, allocated)
        return choose_verdict(*peaks, self.gpu.usable_bytes)

    @property
    def peak_bytes(self) -> int:
        """What must fit, by the trace where there is one."""
        return required_bytes(self.spec, self.gpu, self.allocated_peak_bytes)

    @property
    def fits(self) -> bool:
        """Also where it is tight."""
        return self.word != "does not fit"

    def to_json(self) -> dict[str, Any]:
        values = self.verdict.to_json()
        if self.exact is not None:
            values = {**values, "fits": self.fits, "verdict": self.word, "exact": asdict(self.exact)}
            values["source"] = "estimate and trace" if self.is_estimated else "trace"
        if self.costs is not None:
            values = {**values, **self.costs.to_json(), "warnings": [*values["warnings"], *self.costs.notes]}
        return {
            **values,
            "name": self.spec.name,
            "cluster": self.environment.name,
            "partition": find_partition_name(self.spec, self.environment),
            "backend": self.backend,
        }


def choose_backend(environment: ClusterEnvironment, cluster: str) -> Backend:
    """Slurm where the environment is a Slurm cluster and sbatch is on PATH, else this machine."""
    if cluster == "slurm" or cluster == "local":
        return cluster  # type: ignore[return-value]
    return "slurm" if environment.scheduler == "slurm" and find_command("sbatch") else "local"


def find_partition_name(spec: JobSpec, environment: ClusterEnvironment) -> str | None:
    """The partition that is asked for, or the environment's default."""
    return spec.resources.partition or environment.default_partition


def find_device(spec: JobSpec, environment: ClusterEnvironment) -> Gpu:
    """The device to compare with: the spec's `gpu`, else the partition's, else what this machine has; with the
    constants that earlier runs measured on that type.
    """
    return calibrate(_find_row(spec, environment))


def calibrate(gpu: Gpu) -> Gpu:
    """A GPU with what the runs of this runs folder measured; a smaller allocator overhead than the worst published
    one only after a few runs.
    """
    if (known := load_constants(find_runs_root()).get(gpu.name)) is None:
        return gpu
    worst = known.allocator_worst
    if worst is not None and worst < gpu.allocator_worst and known.runs < FEWEST_RUNS:
        worst = None
    return calibrate_gpu(
        gpu,
        runs=known.runs,
        context_bytes=known.context_bytes,
        nccl_bytes=known.nccl_bytes,
        allocator_worst=worst,
    )


def _find_row(spec: JobSpec, environment: ClusterEnvironment) -> Gpu:
    partition = environment.partitions.get(find_partition_name(spec, environment) or "")
    name = spec.resources.gpu or (partition.gpu if partition else None)
    if name is not None and name != "cpu":
        return find_gpu(name)
    if environment.scheduler == "slurm" and name is None:
        raise SpecError(
            f"no GPU type is known for partition {find_partition_name(spec, environment)!r} of {environment.name}",
            problems=[Problem("resources.gpu", "is needed: the environment names no GPU for this partition")],
            hint="set resources.gpu to a name that `lora-jobs gpus` lists",
        )
    device, memory_bytes = ("cpu", detect_device("cpu")[1]) if name == "cpu" else detect_device()
    return cpu_device(memory_bytes) if device == "cpu" else detected_gpu(device, memory_bytes)


class TracingSizer(Struct):
    """The closed form; for a model that it does not know, a trace in the job's environment, which it keeps."""

    environment: ClusterEnvironment
    exact: Exact | None = None

    def __call__(self, spec: JobSpec, gpu: Gpu, *, warnings: Sequence[str] = (), **advice: Any) -> Verdict:
        try:
            return size_job(spec, gpu, warnings=warnings, **advice)
        except UnknownModelError:
            self.exact = exact = trace_spec(spec, self.environment)
        counts = exact.parameters
        model = TracedModel(exact.instants, counts["base"], counts["trainable"], counts["trainable_bytes"])
        return size_traced(spec, gpu, model, warnings=warnings)


def check_spec(
    spec: JobSpec,
    environment: ClusterEnvironment,
    backend: Backend,
    *,
    place: Placing = tuple,
    compare: bool = False,
    size: Callable[..., Verdict] = size_job,
    read: Reading = find_data_problems,
) -> CheckReport:
    """Everything that can be known before submission; SpecError where the spec contradicts the cluster or the data.

    `place` gives problems the lines of the file they are in; `compare` also sizes other GPUs; `read` looks at the data.
    """
    files = {"data.train": spec.data.train, "data.eval": spec.data.eval}
    absent = {key for key, name in files.items() if name and not Path(name).exists()}
    data_problems = read(spec.data)
    missing = [problem for problem in data_problems if problem.path in absent]
    wrong = [*find_resource_problems(spec.resources, environment), *(p for p in data_problems if p not in missing)]
    if wrong:
        raise SpecError(f"the job {spec.name} can't run as it is written", problems=place(wrong))
    unfetched = find_unfetched(spec, environment) if environment.scheduler == "slurm" else ()
    blockers = place([*missing, *unfetched, *find_submission_problems(spec.resources, environment)])
    warnings = [f"before submitting: {problem.path}: {problem.message}" for problem in blockers]
    warnings += find_unused_resources(spec.resources, environment)
    gpu = find_device(spec, environment)
    sized = name_fetched_model(spec, environment)
    cards = [calibrate(card) for card in list_common_cards(gpu)] if compare and not gpu.is_cpu else []
    verdict = size(sized, gpu, warnings=warnings, elsewhere=list_elsewhere(sized, environment), cards=cards)
    return CheckReport(spec, environment, backend, gpu, verdict, blockers)


def list_elsewhere(spec: JobSpec, environment: ClusterEnvironment) -> Iterator[Elsewhere]:
    """The job on more GPUs of a node, or in another partition; the batch of a step stays what it is."""
    own = find_partition_name(spec, environment)
    partition = environment.partitions.get(own or "")
    what_if = spec.resources.gpu is not None and (partition is None or spec.resources.gpu != partition.gpu)
    if environment.scheduler == "local" or what_if:
        return
    for layout in sorted(list_layouts(spec, environment)[0], key=lambda layout: layout.partition != own):
        values = spec.to_values()
        changed = {
            key: value
            for key, value in layout.settings.items()
            if values[key.split(".")[0]][key.split(".")[1]] != value
            and not (key == "resources.partition" and value == own)
        }
        if layout.only_if_whole or layout.settings["resources.nodes"] != spec.resources.nodes or not changed:
            continue
        moved = replace_values(spec, changed)
        if moved.resources.world_size < spec.resources.world_size or find_resource_problems(
            moved.resources, environment
        ):
            continue
        try:
            gpu = find_device(moved, environment)
        except SpecError:
            continue
        where = f"{moved.resources.world_size} x {gpu.name}"
        where += "" if layout.partition == own else f" in partition {layout.partition}"
        yield Elsewhere(changed, gpu, f"{where}: the same batch of a step")


def anchor_paths(spec: JobSpec) -> JobSpec:
    """Data files and a local model as absolute paths: a requeue or a resume may start in another directory."""
    keys = ("dataset",) if spec.data.names_dataset_directory() else () if spec.data.dataset else ("train", "eval")
    data = {key: str(Path(name).absolute()) for key in keys if (name := getattr(spec.data, key))}
    model = spec.model.name_or_path
    here = {"name_or_path": str(Path(model).absolute()) if Path(model).is_dir() else model}
    return spec.model_copy(
        update={"data": spec.data.model_copy(update=data), "model": spec.model.model_copy(update=here)}
    )


def load_report(path: Path, overrides: Sequence[str], cluster: str) -> CheckReport:
    """The report for where the job will really run; locally, a cluster's spec takes the local environment."""
    document = load_document(path, overrides)
    spec = anchor_paths(document.value)
    environment = load_environment(spec.resources.cluster)
    backend = choose_backend(environment, cluster)
    if backend == "local" and environment.scheduler == "slurm":
        environment = load_environment("local")
        free = {"partition": None, "account": None, "qos": None, "reservation": None, "constraint": None, "gpu": None}
        spec = spec.model_copy(update={"resources": spec.resources.model_copy(update=free)})
    report = check_spec(spec, environment, backend, place=document.place)
    return replace(report, checkout=read_checkout(path.absolute().parent))


def check_job(path: Path, overrides: Sequence[str] = (), *, exact: bool = False) -> CheckReport:
    """Load, check against the environment that the spec names, estimate. Asks neither Slurm nor torch; `exact` also
    traces the real training code, in a process of its own.
    """
    document = load_document(path, overrides)
    environment = load_environment(document.value.resources.cluster)
    sizer = TracingSizer(environment) if exact else None
    report = check_spec(
        document.value,
        environment,
        environment.scheduler,
        place=document.place,
        compare=True,
        size=sizer or size_job,
    )
    sized = name_fetched_model(report.spec, environment)
    if report.is_estimated:
        rows = load_rows(report.spec)
        report = replace(report, costs=estimate_costs(sized, environment, report.gpu, report.verdict, rows))
    if sizer is None:
        return report
    return replace(report, exact=sizer.exact or trace_spec(report.spec, environment))


def trace_spec(spec: JobSpec, environment: ClusterEnvironment) -> Exact:
    """Trace a job with the Python of its environment. Errors: SpecError where it cannot be traced, and why."""
    python = environment.python or sys.executable
    request = json.dumps({"spec": spec.to_values()}) + "\n"
    argv = (python, "-W", "ignore", "-m", "lora_jobs.training.trace")
    answered = run_command(argv, timeout=TRACE_SECONDS, input=request)
    try:
        values = json.loads(answered.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError) as error:
        said = (answered.stderr.strip().splitlines() or ["nothing"])[-1][:300]
        raise SpecError(
            f"--exact: the trace ended with status {answered.returncode} and said: {said}",
            hint=f"it needs torch, transformers, peft and trl in {python}, and a C++ compiler",
        ) from error
    if "error" in values:
        raise SpecError(f"--exact: {values['error']}", hint=values["hint"])
    return Exact(values["peak_bytes"], values["instants"], values["versions"], values["parameters"])
