"""Which attention really runs: what transformers resolves the implementation to, and which kernels that takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import Struct

from lora_jobs.sizing.activations import Attention, choose_attention, choose_kernel, training_batch

if TYPE_CHECKING:
    from lora_jobs.sizing.gpus import Gpu
    from lora_jobs.sizing.models import ModelShape
    from lora_jobs.spec.job import JobSpec

_WORDS: dict[Attention, str] = {"eager": "eager", "efficient": "memory-efficient", "flash": "flash"}


class ResolvedAttention(Struct, frozen=True):
    """transformers' name of the implementation, whether the spec names it, and the kernels of the training batch: of
    layers with full attention first, then of those with a window where that is another.
    """

    implementation: str
    named: bool
    kernels: tuple[Attention, ...]

    @property
    def kernel(self) -> str:
        """The kernels in words, such as "memory-efficient"."""
        return " and ".join(_WORDS[kernel] for kernel in self.kernels)

    @property
    def words(self) -> str | None:
        """What the spec does not say; None where it says all."""
        chosen = self.implementation if self.named else f"{self.implementation} by default"
        if self.implementation == "sdpa":
            return f"{chosen}, its {self.kernel} kernel{'s' if len(self.kernels) > 1 else ''}"
        return None if self.named else chosen

    def to_json(self) -> dict[str, Any]:
        return {"implementation": self.implementation, "kernel": self.kernel}


def resolve_attention(spec: JobSpec, shape: ModelShape, gpu: Gpu) -> ResolvedAttention:
    """The attention of a job on a device."""
    sliding = shape.sliding_layers
    kinds = [*([False] if sliding < shape.num_hidden_layers else []), *([True] if sliding else [])]
    batch = training_batch(spec)
    kernels = dict.fromkeys(choose_kernel(spec, shape, gpu, batch, sliding=kind) for kind in kinds)
    named = spec.model.attn_implementation is not None
    return ResolvedAttention(choose_attention(spec, shape), named, tuple(kernels))
