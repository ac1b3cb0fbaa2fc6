"""A verdict from a trace alone, for a causal model that the closed form does not know."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from lora_jobs.sizing.host import GPU_PROCESS_BYTES, SMALL_FILES_BYTES
from lora_jobs.sizing.instants import Instant
from lora_jobs.sizing.margins import cautious_bytes, list_margins
from lora_jobs.sizing.memory import Estimate
from lora_jobs.sizing.moments import Moment
from lora_jobs.sizing.precision import HALF, SINGLE
from lora_jobs.sizing.verdict import Verdict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lora_jobs.sizing.gpus import Gpu
    from lora_jobs.spec.job import JobSpec

ALLOCATED = "traced_allocation"
"""The component that a trace knows as one sum: every tensor at the peak."""

ADAM_MOMENTS = 2


class TracedModel(Struct, frozen=True):
    """What a trace says of a model: peak bytes by instant, parameters of the base and trained, bytes of the trained."""

    instants: Mapping[str, int]
    base: int
    trainable: int
    trainable_bytes: int


def size_traced(spec: JobSpec, gpu: Gpu, model: TracedModel, *, warnings: Sequence[str] = ()) -> Verdict:
    """The verdict by the trace's own numbers; nothing is suggested, as every change would be another trace."""
    instants = tuple(Instant(name, name.replace("_", " "), {ALLOCATED: size}) for name, size in model.instants.items())
    binding = max(instants, key=lambda instant: instant.total)
    components = {**binding.parts, **list_margins(spec, gpu, binding.total)}
    weights = model.base * (SINGLE if spec.model.dtype == "float32" else HALF)
    estimate = Estimate(
        components=components,
        instants=instants,
        binding=binding,
        allocated_peak_bytes=binding.total,
        peak_bytes=sum(components.values()),
        cautious_peak_bytes=cautious_bytes(spec, gpu, binding.total),
        host_memory_bytes=spec.resources.gpus_per_node * (GPU_PROCESS_BYTES + weights),
        checkpoint_bytes=(1 + ADAM_MOMENTS) * model.trainable_bytes + SMALL_FILES_BYTES,
    )
    fits = estimate.peak_bytes <= gpu.usable_bytes
    peak = Moment(binding.name, binding.words, "in a training step", 1, binding.total)
    return Verdict(
        gpu=gpu,
        world_size=spec.resources.world_size,
        parameters_base=model.base,
        parameters_trainable=model.trainable,
        trainable_words=f"{model.trainable:,} trained, by PEFT's own count",
        estimate=estimate,
        peak=peak,
        death=None if fits else peak,
        suggestions=(),
        warnings=(
            *warnings,
            f"{spec.model.name_or_path} is no model that the estimate knows: every figure is the trace's",
        ),
    )
