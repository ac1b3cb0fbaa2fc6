"""The memory estimate of a job on a device: the instants' peak, what lies outside the allocator, host and disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_jobs.sizing.host import checkpoint_bytes, host_memory_bytes
from lora_jobs.sizing.instants import Instant, list_instants
from lora_jobs.units import MIB

if TYPE_CHECKING:
    from lora_jobs.sizing.gpus import Gpu
    from lora_jobs.sizing.models import ModelShape
    from lora_jobs.spec.job import JobSpec

NCCL_BYTES = 688 * MIB
"""NCCL's buffers on a rank; published: 544 to 688 on 4 x A100."""

ALLOCATOR_MARGIN = 0.05
"""Of the allocated peak: with 4.7 % more than it, 9 of 10 published cases run (the worst needed 17 %)."""

PROCESS_BYTES = 700 * MIB
"""Host memory of a training process before its tensors: 500 MiB of imports measured, the rest assumed for threads."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes that one device must have for the job, and what they are for. `components` add up to `peak_bytes`."""

    components: dict[str, int]
    instants: tuple[Instant, ...]
    binding: Instant
    allocated_peak_bytes: int
    """What torch.cuda.max_memory_allocated would report; per process."""
    peak_bytes: int
    """What must fit: on a CPU, for all processes of the node together."""
    host_memory_bytes: int
    checkpoint_bytes: int

    @property
    def binding_instant(self) -> str:
        """When the peak is, in words."""
        return self.binding.words


def estimate_memory(spec: JobSpec, shape: ModelShape, gpu: Gpu) -> Estimate:
    """The estimate of one rank of the job on one device of type `gpu`."""
    instants = list_instants(spec, shape, gpu)
    binding = max(instants, key=lambda instant: instant.total)
    parts = {name: size for name, size in binding.parts.items() if size}
    components = {**parts, **outside_allocator(spec, gpu, binding.total)}
    peak = sum(components.values())
    return Estimate(
        components=components,
        instants=instants,
        binding=binding,
        allocated_peak_bytes=binding.total,
        peak_bytes=peak,
        host_memory_bytes=peak if gpu.is_cpu else host_memory_bytes(spec, shape),
        checkpoint_bytes=checkpoint_bytes(spec, shape),
    )


def outside_allocator(spec: JobSpec, gpu: Gpu, allocated: int) -> dict[str, int]:
    """What must fit beside the tensors, by name."""
    margin = round(allocated * ALLOCATOR_MARGIN)
    if gpu.is_cpu:
        process = {"process": PROCESS_BYTES, "allocator_margin": margin}
        others = (spec.resources.gpus_per_node - 1) * (allocated + sum(process.values()))
        return {**process, "other_processes_of_the_node": others} if others else process
    outside = {"cuda_context": gpu.context_bytes, "cublas_workspaces": gpu.workspace_bytes}
    if spec.resources.world_size > 1:
        outside["nccl_buffers"] = NCCL_BYTES
    return {**outside, "allocator_margin": margin}
