"""The changes that make a job need less memory, in the order of their cost to the training; one row each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct

from lora_jobs.sizing.activations import choose_attention
from lora_jobs.sizing.losses import uses_fused_loss

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_jobs.sizing.gpus import Gpu
    from lora_jobs.sizing.models import ModelShape
    from lora_jobs.spec.job import JobSpec

Settings = dict[str, Any]
Cost = Literal["none", "time", "other hardware", "result"]

SHORTEST_LENGTH = 512
"""max_length is not suggested below this: rows that long are cut, which changes what is learnt."""

SMALLEST_R = 8


class Change(Struct, frozen=True):
    """One way to need less: the settings it takes for a spec (none where it does not apply), and what it costs."""

    settings: Callable[[JobSpec, ModelShape, Gpu], Settings]
    why: str
    cost: Cost
    hint: Callable[[JobSpec, ModelShape], str] | None = None
    """More to say where it is true."""

    def explain(self, spec: JobSpec, shape: ModelShape) -> str:
        return self.why + (self.hint(spec, shape) if self.hint else "")


def _fuse_loss(spec: JobSpec, _shape: ModelShape, _gpu: Gpu) -> Settings:
    if uses_fused_loss(spec):
        return {}
    return {"training.trainer": "trl"} | (
        {"training.use_liger_kernel": False} if spec.training.use_liger_kernel else {}
    )


def _shrink_evaluation(spec: JobSpec, _shape: ModelShape, _gpu: Gpu) -> Settings:
    return {"training.per_device_eval_batch_size": 1} if spec.training.per_device_eval_batch_size > 1 else {}


def _shrink_bucket(spec: JobSpec, shape: ModelShape, _gpu: Gpu) -> Settings:
    zero = spec.deepspeed
    if zero is None or zero.reduce_bucket_size == "auto" or zero.reduce_bucket_size <= shape.hidden_size**2:
        return {}
    return {"deepspeed.reduce_bucket_size": "auto"}


def _use_sdpa(spec: JobSpec, shape: ModelShape, _gpu: Gpu) -> Settings:
    if choose_attention(spec, shape) != "eager" or shape.traits.attention_soft_cap:
        return {}
    return {"model.attn_implementation": "sdpa"}


def _use_flash(spec: JobSpec, shape: ModelShape, gpu: Gpu) -> Settings:
    if choose_attention(spec, shape) == "flash_attention_2" or gpu.is_cpu or not gpu.has_bf16:
        return {}
    if not (spec.training.bf16 or spec.training.fp16) and spec.model.dtype == "float32":
        return {}
    return {"model.attn_implementation": "flash_attention_2"}


def _checkpoint(spec: JobSpec, _shape: ModelShape, _gpu: Gpu) -> Settings:
    return {} if spec.training.activation_checkpointing else {"training.activation_checkpointing": True}


def _tie(spec: JobSpec, shape: ModelShape, _gpu: Gpu) -> Settings:
    both = {"embed_tokens", "lm_head"} <= set(spec.lora.modules_to_save)
    if not (both and shape.tie_word_embeddings and not spec.lora.ensure_weight_tying):
        return {}
    return {"lora.ensure_weight_tying": True}


def _halve_batch(spec: JobSpec, _shape: ModelShape, _gpu: Gpu) -> Settings:
    batch = spec.training.per_device_train_batch_size
    if batch % 2:
        return {}
    return {
        "training.per_device_train_batch_size": batch // 2,
        "training.gradient_accumulation_steps": spec.training.gradient_accumulation_steps * 2,
    }


def _smallest_batch(spec: JobSpec, _shape: ModelShape, _gpu: Gpu) -> Settings:
    batch = spec.training.per_device_train_batch_size
    if batch < 3:
        return {}
    return {
        "training.per_device_train_batch_size": 1,
        "training.gradient_accumulation_steps": spec.training.gradient_accumulation_steps * batch,
    }


def _shard(stage: int) -> Callable[[JobSpec, ModelShape, Gpu], Settings]:
    def settings(spec: JobSpec, _shape: ModelShape, _gpu: Gpu) -> Settings:
        present = -1 if spec.deepspeed is None else spec.deepspeed.zero_stage
        if spec.resources.world_size < 2 or present >= stage or (stage == 3 and spec.model.quantization):
            return {}
        return {"deepspeed.zero_stage": stage}

    return settings


def _half_base(spec: JobSpec, _shape: ModelShape, gpu: Gpu) -> Settings:
    if spec.model.dtype != "float32" or not gpu.has_bf16 or spec.training.fp16:
        return {}
    return {"model.dtype": "bfloat16", "training.bf16": True}


def _small_adam(spec: JobSpec, _shape: ModelShape, gpu: Gpu) -> Settings:
    offloads = spec.deepspeed is not None and spec.deepspeed.offload_optimizer
    if "bit" in spec.training.optim or offloads or gpu.is_cpu:
        return {}
    return {"training.optim": "adamw_bnb_8bit"}


def _offload(spec: JobSpec, _shape: ModelShape, gpu: Gpu) -> Settings:
    zero = spec.deepspeed
    if zero is None or zero.offload_optimizer or zero.zero_stage == 0 or gpu.is_cpu:
        return {}
    if "bit" in spec.training.optim:
        return {}
    return {"deepspeed.offload_optimizer": True}


def _quantize(spec: JobSpec, _shape: ModelShape, _gpu: Gpu) -> Settings:
    if spec.model.quantization is not None or (spec.deepspeed is not None and spec.deepspeed.zero_stage == 3):
        return {}
    return {"model.quantization.load_in_4bit": True, "model.quantization.bnb_4bit_use_double_quant": True}


def _halve_length(spec: JobSpec, _shape: ModelShape, _gpu: Gpu) -> Settings:
    length = spec.data.max_length // 2
    return {"data.max_length": length} if length >= SHORTEST_LENGTH else {}


def _halve_r(spec: JobSpec, _shape: ModelShape, _gpu: Gpu) -> Settings:
    r = spec.lora.r // 2
    if r < SMALLEST_R:
        return {}
    return {"lora.r": r} if spec.lora.lora_alpha is None else {"lora.r": r, "lora.lora_alpha": spec.lora.alpha / 2}


def _save_nothing(spec: JobSpec, _shape: ModelShape, _gpu: Gpu) -> Settings:
    return {"lora.modules_to_save": []} if spec.lora.modules_to_save else {}


def _name_tokens(spec: JobSpec, shape: ModelShape) -> str:
    """What trains less than the whole embedding, where TRL's loss does not refuse it."""
    if shape.tie_word_embeddings and uses_fused_loss(spec):
        return ""
    return "; lora.trainable_token_indices trains single tokens instead"


CHANGES: tuple[Change, ...] = (
    Change(_fuse_loss, "the same loss without its logits in memory; training is unchanged", "none"),
    Change(_shrink_evaluation, "evaluation only: the same loss, slower", "none"),
    Change(_shrink_bucket, "a smaller communication buffer; training is unchanged", "none"),
    Change(_use_sdpa, "no attention scores in memory; training is unchanged but for rounding", "none"),
    Change(_tie, "embedding and output layer stay one trained tensor, as in the base model", "none"),
    Change(_use_flash, "no attention scores in memory; needs the flash-attn package in the job's environment", "none"),
    Change(_checkpoint, "activations are computed twice: about a third slower, the same result", "time"),
    Change(_halve_batch, "the same effective batch in more micro-batches: a little slower", "time"),
    Change(_smallest_batch, "the same effective batch in micro-batches of one row: slower", "time"),
    Change(_shard(2), "gradients and optimizer state are split over the GPUs", "time"),
    Change(_offload, "optimizer state in host memory: slower steps", "time"),
    Change(_shard(3), "the weights are split over the GPUs too: much more communication", "time"),
    Change(_half_base, "weights in bfloat16: half the memory, less precision", "result"),
    Change(_small_adam, "optimizer state in 8 bits; needs the bitsandbytes package", "result"),
    Change(
        _quantize,
        "base weights in 4 bits (QLoRA): slower, a little less exact; needs the bitsandbytes package",
        "result",
    ),
    Change(_halve_r, "fewer trained parameters: a smaller adapter, which may learn less", "result"),
    Change(_save_nothing, "embedding and output layer stay frozen", "result", _name_tokens),
    Change(_halve_length, "longer rows are left out at this length", "result"),
)
"""Cheapest first. Other hardware comes between what changes the time and what changes the result."""
