"""The memory estimate of a job on a device: the instants' peak, what lies outside the allocator, host and disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from lora_jobs.sizing.host import checkpoint_bytes, host_memory_bytes
from lora_jobs.sizing.instants import UNTRACED, Instant, list_instants
from lora_jobs.sizing.margins import cautious_bytes, list_margins

if TYPE_CHECKING:
    from lora_jobs.sizing.gpus import Gpu
    from lora_jobs.sizing.models import ModelShape
    from lora_jobs.spec.job import JobSpec


class Estimate(Struct, frozen=True):
    """Bytes that one device must have for the job, and what they are for. `components` add up to `peak_bytes`."""

    components: dict[str, int]
    instants: tuple[Instant, ...]
    binding: Instant
    allocated_peak_bytes: int
    """What torch.cuda.max_memory_allocated would report; per process."""
    peak_bytes: int
    """What must fit: on a CPU, for all processes of the node together."""
    cautious_peak_bytes: int
    """The same with the worst allocator known in the place of the usual one: above it, a verdict of "fits" is sure."""
    host_memory_bytes: int
    checkpoint_bytes: int

    @property
    def peaks(self) -> dict[str, int]:
        """Allocated bytes at each instant, by its name."""
        return {instant.name: instant.total for instant in self.instants}

    @property
    def untraced_peak_bytes(self) -> int:
        """The most at the instants that a trace has not: loading and saving."""
        return max((instant.total for instant in self.instants if instant.name in UNTRACED), default=0)

    @property
    def step_peak_bytes(self) -> int:
        """The most at those that it has."""
        return max(instant.total for instant in self.instants if instant.name not in UNTRACED)

    @property
    def binding_instant(self) -> str:
        """When the peak is, in words."""
        return self.binding.words


def estimate_memory(spec: JobSpec, shape: ModelShape, gpu: Gpu) -> Estimate:
    """The estimate of one rank of the job on one device of type `gpu`."""
    instants = list_instants(spec, shape, gpu)
    binding = max(instants, key=lambda instant: instant.total)
    parts = {name: size for name, size in binding.parts.items() if size}
    components = {**parts, **list_margins(spec, gpu, binding.total)}
    peak = sum(components.values())
    return Estimate(
        components=components,
        instants=instants,
        binding=binding,
        allocated_peak_bytes=binding.total,
        peak_bytes=peak,
        cautious_peak_bytes=cautious_bytes(spec, gpu, binding.total),
        host_memory_bytes=peak if gpu.is_cpu else host_memory_bytes(spec, shape),
        checkpoint_bytes=checkpoint_bytes(spec, shape),
    )


def list_peaks(spec: JobSpec, shape: ModelShape, gpu: Gpu) -> dict[str, int]:
    """Allocated bytes at each instant, by its name: the part of the estimate that a change is judged by."""
    return {instant.name: instant.total for instant in list_instants(spec, shape, gpu)}
