"""What would fail on the node, hours later, and is refused by `check` instead: one function a rule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_jobs.errors import Problem, SpecError
from lora_jobs.sizing.activations import choose_attention
from lora_jobs.sizing.losses import uses_fused_loss
from lora_jobs.sizing.modules import HEAD
from lora_jobs.sizing.parameters import list_adapted_names, trainable_tensors
from lora_jobs.sizing.precision import HALF, choose_precision
from lora_jobs.sizing.state import tensor_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_jobs.sizing.gpus import Gpu
    from lora_jobs.sizing.models import ModelShape
    from lora_jobs.spec.job import JobSpec


def refuse_unworkable(spec: JobSpec, shape: ModelShape, gpu: Gpu) -> None:
    """What would fail on the node, hours later: SpecError with all of it."""
    if problems := find_unworkable(spec, shape, gpu):
        raise SpecError("; ".join(problem.message for problem in problems), problems=problems)


def find_unworkable(spec: JobSpec, shape: ModelShape, gpu: Gpu) -> list[Problem]:
    """Every setting that the libraries refuse for this model on this device."""
    return [
        *_find_attention(spec, shape, gpu),
        *_find_adapted_head(spec, shape),
        *_find_tied_tokens(spec, shape),
        *_find_half_on_cpu(spec, gpu),
        *_find_half_trained(spec, shape, gpu),
    ]


def _find_attention(spec: JobSpec, shape: ModelShape, gpu: Gpu) -> Iterator[Problem]:
    if shape.traits.attention_soft_cap and choose_attention(spec, shape) == "sdpa":
        yield Problem(
            "model.attn_implementation",
            f"{shape.name} soft-caps its attention, which transformers refuses under sdpa; wanted eager (its default) "
            "or flash_attention_2",
        )
    if spec.model.attn_implementation == "flash_attention_2" and (gpu.is_cpu or not gpu.has_bf16):
        yield Problem(
            "model.attn_implementation",
            f"flash_attention_2 does not run on {gpu.name}: it needs a GPU of compute capability 8.0 or above; "
            "wanted sdpa or eager",
        )


def _find_adapted_head(spec: JobSpec, shape: ModelShape) -> Iterator[Problem]:
    if HEAD in list_adapted_names(shape, spec.lora) and uses_fused_loss(spec):
        yield Problem(
            "lora.target_modules",
            "an adapter on lm_head is refused by TRL, whose loss reads lm_head's own weight; leave it out, or set "
            "training.trainer: transformers",
        )


def _find_tied_tokens(spec: JobSpec, shape: ModelShape) -> Iterator[Problem]:
    """PEFT wraps a tied lm_head along with the embedding, and TRL's loss looks for its bias."""
    if spec.lora.trainable_token_indices and shape.tie_word_embeddings and uses_fused_loss(spec):
        yield Problem(
            "lora.trainable_token_indices",
            f"{shape.name} ties its embeddings, and TRL's loss cannot read an output layer with trained tokens; set "
            "training.trainer: transformers",
        )


def _find_half_on_cpu(spec: JobSpec, gpu: Gpu) -> Iterator[Problem]:
    """transformers ignores fp16 there without a word, DeepSpeed refuses it."""
    if spec.training.fp16 and gpu.is_cpu:
        yield Problem("training.fp16", "needs a GPU, and the job is for a machine without one: use bf16 or neither")
    if spec.training.use_liger_kernel and gpu.is_cpu:
        yield Problem("training.use_liger_kernel", "needs a GPU: Liger's kernels are Triton's")


def _find_half_trained(spec: JobSpec, shape: ModelShape, gpu: Gpu) -> Iterator[Problem]:
    """PEFT makes adapters float32, never what modules_to_save and bias train; DeepSpeed makes float32 copies of all.

    Source: GradScaler.unscale_ of torch 2.13, which the Trainer calls at every step, clipping or not.
    """
    if not spec.training.fp16 or spec.deepspeed is not None:
        return
    precision = choose_precision(spec)
    words = {"lora": "the adapters (lora.autocast_adapter_dtype)", "tokens": "the trained tokens", "bias": "the biases"}
    half = dict.fromkeys(
        words.get(tensor.part, f"{tensor.module.leaf} (lora.modules_to_save)")
        for tensor in trainable_tensors(shape, spec.lora)
        if tensor_bytes(tensor, precision) == HALF * tensor.elements
    )
    if half:
        others = "training.bf16 with model.dtype: bfloat16; or " if gpu.has_bf16 else ""
        yield Problem(
            "training.fp16",
            f"would train {', '.join(half)} in float16, which torch's gradient scaler refuses at the first step "
            '("Attempting to unscale FP16 gradients"); wanted trained weights in float32: '
            f"set {others}model.dtype: float32; or deepspeed.zero_stage: 2, which keeps float32 copies",
        )
