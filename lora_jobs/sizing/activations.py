"""What the forward pass of a layer keeps for the backward pass, part by part; mostly in bytes per token.

Letters: T tokens of a micro-batch, h hidden, i intermediate, q and kv sizes of queries and keys, H heads, s sequence
length, r of LoRA. Source: traces of transformers' and PEFT's own code, torch's allocated bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from lora_jobs.sizing.parameters import trainable_tensors
from lora_jobs.sizing.precision import HALF, SINGLE, Precision

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_jobs.sizing.gpus import Gpu
    from lora_jobs.sizing.models import ModelShape
    from lora_jobs.spec.job import JobSpec

Attention = Literal["eager", "efficient", "flash"]

QKV = ("q_proj", "k_proj", "v_proj", "qkv_proj")
GATE_UP = ("gate_proj", "up_proj", "gate_up_proj")


class Batch(Struct, frozen=True):
    """One micro-batch: rows of `sequence` tokens, padded to the longest."""

    rows: int
    sequence: int

    @property
    def tokens(self) -> int:
        return self.rows * self.sequence


def training_batch(spec: JobSpec) -> Batch:
    """The largest micro-batch: every row as long as data.max_length allows, padded up to the multiple asked for."""
    return _batch(spec, spec.training.per_device_train_batch_size)


def evaluation_batch(spec: JobSpec) -> Batch:
    """The largest evaluation batch."""
    return _batch(spec, spec.training.per_device_eval_batch_size)


def _batch(spec: JobSpec, rows: int) -> Batch:
    """With packing TRL's collator lays all rows end to end in one, also in evaluation (padding_free)."""
    length = _padded_length(spec)
    return Batch(1, rows * length) if spec.data.packing else Batch(rows, length)


def _padded_length(spec: JobSpec) -> int:
    multiple = spec.data.pad_to_multiple_of or 1
    return -(-spec.data.max_length // multiple) * multiple


def choose_attention(spec: JobSpec, shape: ModelShape) -> str:
    """The implementation by transformers' name: the spec's, else what the family defaults to."""
    return spec.model.attn_implementation or shape.traits.default_attention


def choose_kernel(spec: JobSpec, shape: ModelShape, gpu: Gpu, batch: Batch, *, sliding: bool) -> Attention:
    """Which kernel runs. sdpa takes flash only without a mask (one unpadded row, no window shorter than the row),
    in half precision, on Ampere or newer; else the memory-efficient one.
    """
    name = choose_attention(spec, shape)
    if name == "eager":
        return "eager"
    if name == "flash_attention_2":
        return "flash"
    windowed = sliding and shape.sliding_window is not None and batch.sequence >= shape.sliding_window
    masked = batch.rows > 1 or spec.data.packing or spec.data.pad_to_multiple_of is not None or windowed
    half = spec.training.bf16 or spec.training.fp16 or spec.model.dtype != "float32"
    return "flash" if (gpu.is_cpu or (half and gpu.has_bf16)) and not masked else "efficient"


def norm_bytes(size: int) -> int:
    """RMSNorm keeps its input in fp32 and one fp32 scale: 4 h + 4."""
    return SINGLE * size + SINGLE


def norms_bytes(shape: ModelShape) -> int:
    """All norms of a layer."""
    return shape.traits.norms_per_layer * norm_bytes(shape.hidden_size) + head_norm_bytes(shape)


def head_norm_bytes(shape: ModelShape) -> int:
    """The norms of queries and keys, head by head."""
    if not shape.traits.qk_norm:
        return 0
    heads = shape.num_attention_heads + shape.num_key_value_heads
    return SINGLE * (shape.query_size + shape.key_value_size + heads)


def attention_bytes(shape: ModelShape, precision: Precision, batch: Batch, kernel: Attention) -> int:
    """flash: q, k, v, output and a fp32 logsumexp a head. Memory-efficient: the same with keys and values repeated for
    every head, and the mask. Eager: q, repeated k and v, and the scores of every head, fp32 and cast (Gemma 2: also
    its soft-cap's).
    """
    q, kv, heads, s = shape.query_size, shape.key_value_size, shape.num_attention_heads, batch.sequence
    width = precision.attention
    # A fused projection's values are a view of all that it gives, which lives as long as they do.
    fused = q + kv if shape.traits.fused_projections and not precision.casts_queries else 0
    alone = shape.num_key_value_heads == shape.num_attention_heads
    if kernel == "flash":
        return width * (2 * q + 2 * kv + fused) + SINGLE * heads
    if kernel == "efficient":
        repeated = 2 * kv if shape.num_key_value_heads == 1 and not precision.casts_queries else 2 * q
        return width * (2 * q + repeated + (fused if alone else 0)) + SINGLE * heads + width * s
    scores = SINGLE + (HALF if width == HALF else 0) + (width if shape.traits.attention_soft_cap else 0)
    kept = expanded_keys(shape, batch) + (fused if alone and batch.rows == 1 else 0)
    return width * (q + kept) + scores * heads * s


def expanded_keys(shape: ModelShape, batch: Batch) -> int:
    """Elements of keys and values as eager attention keeps them, repeated unless one head serves one row."""
    return 2 * shape.key_value_size if shape.num_key_value_heads == 1 and batch.rows == 1 else 2 * shape.query_size


def adapter_bytes(
    spec: JobSpec, shape: ModelShape, precision: Precision, kernel: Attention, targets: Mapping[str, int]
) -> int:
    """Per adapted layer: its input (its own copy where it is cast or dropped out), a mask byte, and A's output r.

    What the attention gives is kept once, for itself and for o_proj, where it comes out in the order of tokens. Behind
    a fused projection flash gives it in the order of heads, as it gets its queries there, and o_proj's is a copy.
    """
    h, q, i = shape.hidden_size, shape.query_size, shape.intermediate_size
    dropout = spec.lora.lora_dropout > 0
    width = precision.lora_input
    outputs = width * sum(targets.values())
    groups = ((QKV, h), (("o_proj",), q), (GATE_UP, h), (("down_proj",), i))
    shares_output = kernel == "efficient" or (kernel == "flash" and not shape.traits.fused_projections)
    total = outputs
    for names, size in groups:
        adapted = len([name for name in names if name in targets])
        if dropout or not precision.shares_input:
            total += adapted * (width + (1 if dropout else 0)) * size
        elif adapted and not (names == ("o_proj",) and shares_output):
            total += width * size
    return total


def mask_bytes(spec: JobSpec, shape: ModelShape, gpu: Gpu, precision: Precision, batch: Batch) -> int:
    """Attention masks, rows x s x s: eager adds one of the compute dtype per mask type; sdpa one of booleans per type
    that runs on the memory-efficient kernel (flash takes none).
    """
    kernels = [choose_kernel(spec, shape, gpu, batch, sliding=sliding) for sliding in (False, True)]
    square = batch.rows * batch.sequence**2
    if "eager" in kernels:
        return precision.attention * square * shape.mask_types
    return square * min(kernels.count("efficient"), shape.mask_types)


def rope_bytes(shape: ModelShape, precision: Precision, batch: Batch) -> int:
    """Cosines and sines, s x rotary_dim each; Gemma 3 has two sets."""
    return 2 * precision.residual * batch.sequence * shape.rotary_dim * shape.traits.rope_types


def input_needs_gradient(spec: JobSpec, shape: ModelShape) -> bool:
    """Whether the first layer's input gets a gradient: the embedding is trained or adapted."""
    return any(tensor.module.is_token_embedding for tensor in trainable_tensors(shape, spec.lora))
