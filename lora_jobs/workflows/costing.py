"""What a job needs beside the GPU's memory: host memory, disk and time, each beside what there is of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import Struct

from lora_jobs.cluster.surroundings import read_disk
from lora_jobs.runs import FEWEST_KEPT, find_runs_root
from lora_jobs.sizing import find_shape
from lora_jobs.sizing.duration import Duration, Rows, Work, count_work, estimate_duration
from lora_jobs.sizing.host import adapter_bytes, host_parts
from lora_jobs.units import format_duration, format_gib, parse_duration, parse_size
from lora_jobs.workflows.lengths import judge_lengths
from lora_jobs.workflows.speeds import measure_speeds
from lora_jobs.workflows.timing import count_jobs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lora_jobs.sizing import Gpu, Verdict
    from lora_jobs.spec import ClusterEnvironment, JobSpec

SAMPLE_ROWS = 1000
"""Rows that a time is given for where the data is not here."""


class HostCost(Struct, frozen=True):
    """Host memory of one node at the most, by part, and what the job asks for or the node has."""

    parts: dict[str, int]
    limit_bytes: int | None
    limit_of: str | None

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class DiskCost(Struct, frozen=True):
    """The checkpoints that are there at once, the adapter, and the free space of the runs folder's file system."""

    checkpoint_bytes: int
    kept: int
    adapter_bytes: int
    free_bytes: int | None
    path: Path

    @property
    def total(self) -> int:
        return self.checkpoint_bytes * self.kept + self.adapter_bytes


class TimeCost(Struct, frozen=True):
    """The expected duration against the time limit; `rows` where it is for so many rows only: the data is not here,
    else `train`, its rows.
    """

    duration: Duration
    limit_seconds: int
    jobs: int | None
    rows: int | None
    train: Rows | None = None

    @property
    def requeues(self) -> int | None:
        """How often the job goes back into the queue; None where the limit leaves no time, or the rows are unknown."""
        return None if self.jobs is None or self.rows is not None else self.jobs - 1


class Costs(Struct, frozen=True):
    """Host memory, disk, time; `time` is None where nothing is known of the GPU's speed."""

    host: HostCost
    disk: DiskCost
    time: TimeCost | None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        time, disk, host = self.time, self.disk, self.host
        return {
            "host": {
                "bytes": host.total,
                "parts": host.parts,
                "limit_bytes": host.limit_bytes,
                "limit_of": host.limit_of,
            },
            "disk": {
                "checkpoint_bytes": disk.checkpoint_bytes,
                "kept": disk.kept,
                "adapter_bytes": disk.adapter_bytes,
                "needed_bytes": disk.total,
                "free_bytes": disk.free_bytes,
                "path": str(disk.path),
            },
            "time": time
            and {
                "seconds": round(time.duration.seconds),
                "parts": {name: round(part) for name, part in time.duration.components.items()},
                "steps": time.duration.steps,
                "tokens_per_second": round(time.duration.tokens_per_second, 1),
                "speed": time.duration.basis,
                "measured": time.duration.measured,
                "limit_seconds": time.limit_seconds,
                "requeues": time.requeues,
                "for_rows": time.rows,
                "row_lengths": None if time.train is None else time.train.basis,
            },
        }


def estimate_costs(
    spec: JobSpec,
    environment: ClusterEnvironment,
    gpu: Gpu,
    verdict: Verdict,
    rows: tuple[Rows | None, Rows | None],
) -> Costs:
    """Host memory, disk and time of a job where it will run on these rows. Reads the records of earlier runs."""
    notes: list[str] = []
    host, disk = _cost_host(spec, environment, gpu, verdict), _cost_disk(spec, verdict)
    time = _cost_time(spec, gpu, rows, notes)
    return Costs(host, disk, time, (*_find_shortages(spec, host, disk, time), *judge_lengths(spec, rows), *notes))


def _cost_host(spec: JobSpec, environment: ClusterEnvironment, gpu: Gpu, verdict: Verdict) -> HostCost:
    partition = environment.find_partition(spec.resources.partition)
    in_node = partition.mem_per_node if partition is not None else None
    limit: tuple[int, str] | tuple[None, None] = (None, None)
    if spec.resources.mem is not None:
        limit = (parse_size(spec.resources.mem), "asked for")
    elif in_node is not None:
        limit = (parse_size(in_node), "in a node")
    elif gpu.is_cpu:
        limit = (gpu.memory_bytes, "in this machine")
    parts = (
        {"processes": verdict.estimate.host_memory_bytes}
        if gpu.is_cpu
        else host_parts(spec, find_shape(spec.model.name_or_path))
    )
    return HostCost(parts, *limit)


def _cost_disk(spec: JobSpec, verdict: Verdict) -> DiskCost:
    """The newest ones, the best one where it is kept, and the next while it is written."""
    kept = FEWEST_KEPT + int(spec.training.load_best_model_at_end) + 1
    root = find_runs_root()
    try:
        free: int | None = read_disk(root).free_bytes
    except OSError:
        free = None
    adapter = adapter_bytes(spec, find_shape(spec.model.name_or_path))
    return DiskCost(verdict.estimate.checkpoint_bytes, kept, adapter, free, root)


def _cost_time(spec: JobSpec, gpu: Gpu, found: tuple[Rows | None, Rows | None], notes: list[str]) -> TimeCost | None:
    train, evaluation = found
    work, rows = count_work(spec, train, evaluation), None
    if work is None or (train is None and spec.training.max_steps is None):
        work = _sample_work(spec)
        rows = work.sequences
    measured = measure_speeds(spec, find_runs_root(), notes).get(gpu.name)
    duration = estimate_duration(
        spec,
        find_shape(spec.model.name_or_path),
        gpu,
        work,
        measured=measured.tokens_per_second if measured else None,
        runs=measured.runs if measured else "",
    )
    if duration is None:
        return None
    return TimeCost(duration, parse_duration(spec.resources.time), count_jobs(spec, duration), rows, train)


def _sample_work(spec: JobSpec) -> Work:
    """So many full rows as whole steps; no evaluation."""
    training = spec.training
    per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * spec.resources.world_size
    steps = max(1, round(SAMPLE_ROWS / per_step))
    tokens = steps * per_step * spec.data.max_length
    return Work(steps, steps * per_step, float(spec.data.max_length), float(tokens), 0.0)


def _find_shortages(spec: JobSpec, host: HostCost, disk: DiskCost, time: TimeCost | None) -> Iterator[str]:
    """What the job needs more of than there is; host memory under resources.mem is the sizing's own warning."""
    if host.limit_of == "in a node" and host.limit_bytes is not None and host.total > host.limit_bytes:
        yield (
            f"loading needs about {format_gib(host.total)} of host memory per node, "
            f"a node of this partition has {format_gib(host.limit_bytes)}"
        )
    if disk.free_bytes is not None and disk.total > disk.free_bytes:
        yield (
            f"{disk.kept} checkpoints and the adapter take {format_gib(disk.total)} at once, {disk.path} has "
            f"{format_gib(disk.free_bytes)} free: set LORA_JOBS_HOME to a larger disk"
        )
    if time is None or time.rows is not None:
        return
    if time.jobs is None:
        yield f"resources.time {spec.resources.time} leaves no time to train: loading takes about {_start(time)}"
    else:
        allowed = spec.resume.max_attempts if spec.resume.auto else 1
        if time.jobs > allowed:
            needed = format_duration(time.duration.seconds)
            yield f"about {needed} of work take {time.jobs} jobs of {spec.resources.time}, resume allows {allowed}"


def _start(time: TimeCost) -> str:
    return f"{time.duration.components['start']:.0f} s"
