"""Host memory of a node, and the disk that one checkpoint takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_jobs.sizing.parameters import count_parameters
from lora_jobs.sizing.precision import HALF, SINGLE, choose_precision
from lora_jobs.sizing.state import compute_sizes, compute_state
from lora_jobs.units import GIB, MIB

if TYPE_CHECKING:
    from lora_jobs.sizing.models import ModelShape
    from lora_jobs.sizing.state import Sizes
    from lora_jobs.spec.job import JobSpec

GPU_PROCESS_BYTES = 3 * GIB
"""Host memory of a process that uses a GPU: libraries, the CUDA runtime and pinned buffers. Assumption."""

WORKER_BYTES = 512 * MIB
"""Host memory of one data loader worker. Assumption."""

SHARD_BYTES = 5 * 10**9
"""Largest file of a hub checkpoint; a quantized model is loaded file by file. Source: max_shard_size's default."""

TOKENIZER_BYTES_PER_TOKEN = 134
"""Size of a tokenizer.json per vocabulary entry: Llama 3's, 17.2 MB for 128,256; Gemma's is as large."""

SMALL_FILES_BYTES = MIB
"""Random states, trainer state, arguments and configs of a checkpoint, a rank. Assumption, on the high side."""


def host_parts(spec: JobSpec, shape: ModelShape) -> dict[str, int]:
    """Host bytes of one node at the most, by name: every process loads the base model on the CPU before it goes to
    its GPU; later the offloaded optimizer state, which DeepSpeed pins, takes its place.
    """
    state = compute_state(spec, shape, choose_precision(spec))
    width = SINGLE if spec.model.dtype == "float32" else HALF
    loading = count_parameters(shape) * width
    if spec.model.quantization is not None:
        loading = min(loading, SHARD_BYTES)
    offloads = state.host_optimizer > loading
    parts = {
        "processes": GPU_PROCESS_BYTES,
        "offloaded_optimizer_pinned" if offloads else "base_model_while_loading": max(loading, state.host_optimizer),
        "data_loader_workers": spec.training.dataloader_num_workers * WORKER_BYTES,
    }
    return {name: size * spec.resources.gpus_per_node for name, size in parts.items() if size}


def host_memory_bytes(spec: JobSpec, shape: ModelShape) -> int:
    """Host bytes of one node at the most."""
    return sum(host_parts(spec, shape).values())


def adapter_bytes(spec: JobSpec, shape: ModelShape) -> int:
    """Bytes of adapter/: the trained weights and the tokenizer."""
    return _find_sizes(spec, shape).gradients + TOKENIZER_BYTES_PER_TOKEN * shape.vocab_size


def checkpoint_bytes(spec: JobSpec, shape: ModelShape) -> int:
    """Bytes of one checkpoint of all ranks: the adapter, the optimizer's state, the tokenizer and small files.

    DeepSpeed writes the trained weights once more (model states) and a fp32 master copy with the moments.
    """
    sizes = _find_sizes(spec, shape)
    states = sizes.moments
    if spec.deepspeed is not None:
        states += sizes.gradients + SINGLE * sizes.elements
    return adapter_bytes(spec, shape) + states + SMALL_FILES_BYTES * spec.resources.world_size


def _find_sizes(spec: JobSpec, shape: ModelShape) -> Sizes:
    return compute_sizes(shape, spec.lora, choose_precision(spec), spec.model.quantization, spec.training.optim)
