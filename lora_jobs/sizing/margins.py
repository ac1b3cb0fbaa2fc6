"""What a device needs beside the allocated tensors, part by part, and which verdict that makes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from lora_jobs.units import MIB

if TYPE_CHECKING:
    from lora_jobs.sizing.gpus import Gpu
    from lora_jobs.spec.job import JobSpec

Word = Literal["fits", "tight", "does not fit"]

ALLOCATOR_MARGIN = 0.05
"""Of the allocated peak: with 4.7 % more than it, 9 of 10 published cases run (the worst needed 17 %)."""

MARGINS = (
    "cuda_context", "cublas_workspaces", "nccl_buffers", "allocator_margin", "process", "other_processes_of_the_node",
)  # fmt: skip
"""What can stand beside the allocated tensors, by name."""

PROCESS_BYTES = 700 * MIB
"""Host memory of a training process before its tensors: 500 MiB of imports measured, the rest assumed for threads."""


def list_margins(spec: JobSpec, gpu: Gpu, allocated: int, *, allocator: float = ALLOCATOR_MARGIN) -> dict[str, int]:
    """What must fit beside `allocated` bytes of tensors, by name; `allocator` is the share lost to fragmentation."""
    margin = round(allocated * allocator)
    if gpu.is_cpu:
        process = {"process": PROCESS_BYTES, "allocator_margin": margin}
        others = (spec.resources.gpus_per_node - 1) * (allocated + sum(process.values()))
        return {**process, "other_processes_of_the_node": others} if others else process
    outside = {"cuda_context": gpu.context_bytes, "cublas_workspaces": gpu.workspace_bytes}
    if spec.resources.world_size > 1:
        outside["nccl_buffers"] = gpu.nccl_bytes
    return {**outside, "allocator_margin": margin}


def required_bytes(spec: JobSpec, gpu: Gpu, allocated: int) -> int:
    """What must fit: the tensors and everything beside them, the allocator as 9 of 10 cases have it."""
    return allocated + sum(list_margins(spec, gpu, allocated).values())


def cautious_bytes(spec: JobSpec, gpu: Gpu, allocated: int) -> int:
    """The same with the worst allocator known for this GPU."""
    worst = max(gpu.allocator_worst, ALLOCATOR_MARGIN)
    return allocated + sum(list_margins(spec, gpu, allocated, allocator=worst).values())


def choose_verdict(peak_bytes: int, cautious_peak_bytes: int, usable_bytes: int) -> Word:
    """fits: also with the worst allocator; tight: with the usual one only; does not fit: not even with that."""
    if peak_bytes > usable_bytes:
        return "does not fit"
    return "fits" if cautious_peak_bytes <= usable_bytes else "tight"
