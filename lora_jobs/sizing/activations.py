"""What the forward pass keeps for the backward pass, and what the backward pass adds; bytes per token, by layer.

Letters: T tokens of a micro-batch, h hidden, i intermediate, q and kv sizes of queries and keys, H heads, s sequence
length, r of LoRA. Source: traces of transformers' and PEFT's own code, torch's allocated bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from lora_jobs.sizing import quantized
from lora_jobs.sizing.dora import saved_bytes as dora_bytes
from lora_jobs.sizing.dora import transient_bytes as dora_transient_bytes
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


@dataclass(frozen=True, slots=True)
class Batch:
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


@dataclass(frozen=True, slots=True)
class LayerCost:
    """Bytes per token of one layer, by what keeps them."""

    norms: int
    attention: int
    mlp: int
    adapters: int
    adapter_elements: int
    """LoRA parameters of the layer."""
    dora: int
    """Bytes (not per token) that DoRA keeps of the layer."""
    dora_transient: int
    """Bytes that DoRA needs beside them while its largest layer runs."""
    mlp_backward: int
    """Live in the MLP's backward, beside what was saved."""
    attention_backward: int
    """Live in the attention's backward, saved values included (eager only)."""
    fused_gate: bool
    """An adapter on one projection for gate and up together."""
    first_unneeded: int
    """Of the first layer: what is not saved when its input needs no gradient."""

    @property
    def saved(self) -> int:
        return self.norms + self.attention + self.mlp + self.adapters


def layer_costs(spec: JobSpec, shape: ModelShape, gpu: Gpu, precision: Precision, batch: Batch) -> list[LayerCost]:
    """The cost of every layer; layers differ by window and by which of their projections carry an adapter."""
    ranks: list[dict[str, int]] = [{} for _ in range(shape.num_hidden_layers)]
    elements = [0] * shape.num_hidden_layers
    dora: list[list[int]] = [[0, 0] for _ in range(shape.num_hidden_layers)]
    dropout = spec.lora.lora_dropout > 0
    for tensor in trainable_tensors(shape, spec.lora):
        if tensor.part == "lora" and tensor.module.layer is not None:
            if tensor.rank:
                ranks[tensor.module.layer][tensor.module.leaf] = tensor.rank
            if tensor.rank and spec.lora.use_dora:
                kept = dora_bytes(tensor.module, precision, batch.tokens, dropout=dropout)
                live = dora_transient_bytes(tensor.module, precision, batch.tokens, dropout=dropout)
                dora[tensor.module.layer][0] += kept
                dora[tensor.module.layer][1] = max(dora[tensor.module.layer][1], live)
            elements[tensor.module.layer] += tensor.elements
    known: dict[tuple[tuple[tuple[str, int], ...], bool, int], LayerCost] = {}
    every = shape.traits.full_attention_every
    costs = []
    for layer in range(shape.num_hidden_layers):
        sliding = shape.sliding_window is not None and not (every and (layer + 1) % every == 0)
        key = (tuple(ranks[layer].items()), sliding, elements[layer])
        if key not in known:
            kernel = choose_kernel(spec, shape, gpu, batch, sliding=sliding)
            cost = _layer_cost(spec, shape, precision, batch, kernel, ranks[layer], elements[layer])
            known[key] = replace(cost, dora=dora[layer][0], dora_transient=dora[layer][1])
        costs.append(known[key])
    return costs


def _layer_cost(
    spec: JobSpec,
    shape: ModelShape,
    precision: Precision,
    batch: Batch,
    kernel: Attention,
    targets: Mapping[str, int],
    elements: int,
) -> LayerCost:
    h, q, i = shape.hidden_size, shape.query_size, shape.intermediate_size
    dropout = 1 if spec.lora.lora_dropout > 0 else 0
    adapters = _adapter_bytes(spec, shape, precision, kernel, targets)
    attention = _attention_bytes(shape, precision, batch, kernel)
    in_qkv = [name for name in QKV if name in targets]
    qkv_adapters = _adapter_bytes(spec, shape, precision, kernel, {name: targets[name] for name in in_qkv})
    attention_backward = 0
    if kernel == "eager":
        scores = (
            (3 * SINGLE if not shape.traits.attention_soft_cap else 3 * SINGLE + HALF) * precision.attention // HALF
        )
        attention_backward = (
            norm_bytes(h)
            + _head_norm_bytes(shape)
            + qkv_adapters
            + precision.residual * h
            + 2 * precision.attention * q
            + precision.attention * _expanded_keys(shape, batch) // 2
            + scores * shape.num_attention_heads * batch.sequence
        )
    return LayerCost(
        norms=_norms_bytes(shape),
        attention=attention,
        mlp=3 * precision.output * i,
        adapters=adapters,
        adapter_elements=elements,
        dora=0,
        dora_transient=0,
        mlp_backward=_mlp_backward(spec, shape, precision, batch, adapted="down_proj" in targets),
        attention_backward=attention_backward,
        fused_gate="gate_up_proj" in targets,
        first_unneeded=norm_bytes(h) + dropout * h * len(in_qkv),
    )


# Bytes per token at the worst moment of an MLP's backward beside what was saved: (times i, times h, times h where a
# layer has four norms), for half-precision outputs. Traced; by how adapters meet the base, and with dropout or not.
_MLP_BACKWARD = {
    ("cast", True): (10, 10, 8),
    ("cast", False): (6, 10, 12),
    ("mixed", True): (6, 14, 16),
    ("mixed", False): (4, 12, 8),
    ("uniform", True): (2, 10, 14),
    ("uniform", False): (4, 2, 6),
}
_MLP_BACKWARD_UNADAPTED = (6, 2, -2)


def _mlp_backward(spec: JobSpec, shape: ModelShape, precision: Precision, batch: Batch, *, adapted: bool) -> int:
    """Where down_proj carries an adapter, that adapter's inputs and gradients; else the gradients of gate and up."""
    h, i, four_norms = shape.hidden_size, shape.intermediate_size, shape.traits.norms_per_layer == 4
    dropout = spec.lora.lora_dropout > 0
    most = 0
    if spec.model.quantization is not None:
        most = quantized.mlp_backward(spec, shape, precision, batch, adapted=adapted)
        if precision.residual == SINGLE:
            return most
    if precision.base == SINGLE and precision.output != precision.adapter:  # autocast over a fp32 base
        per_input = precision.adapter_backward_dropout if dropout else precision.adapter_backward
        freed = norm_bytes(h) if four_norms else 0
        streams = 6 if four_norms else 5
        return (per_input if adapted else 3 * precision.output) * i + streams * precision.output * h - freed
    style = "cast" if precision.casts_adapters else "uniform" if precision.adapter == precision.output else "mixed"
    per_i, per_h, per_h_four = _MLP_BACKWARD[style, dropout] if adapted else _MLP_BACKWARD_UNADAPTED
    return max(most, precision.output * (per_i * i + (per_h_four if four_norms else per_h) * h) // HALF)


def norm_bytes(size: int) -> int:
    """RMSNorm keeps its input in fp32 and one fp32 scale: 4 h + 4."""
    return SINGLE * size + SINGLE


def _norms_bytes(shape: ModelShape) -> int:
    return shape.traits.norms_per_layer * norm_bytes(shape.hidden_size) + _head_norm_bytes(shape)


def _head_norm_bytes(shape: ModelShape) -> int:
    """The norms of queries and keys, head by head."""
    if not shape.traits.qk_norm:
        return 0
    heads = shape.num_attention_heads + shape.num_key_value_heads
    return SINGLE * (shape.query_size + shape.key_value_size + heads)


def _attention_bytes(shape: ModelShape, precision: Precision, batch: Batch, kernel: Attention) -> int:
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
    kept = _expanded_keys(shape, batch) + (fused if alone and batch.rows == 1 else 0)
    return width * (q + kept) + scores * heads * s


def _expanded_keys(shape: ModelShape, batch: Batch) -> int:
    """Elements of keys and values as eager attention keeps them, repeated unless one head serves one row."""
    return 2 * shape.key_value_size if shape.num_key_value_heads == 1 and batch.rows == 1 else 2 * shape.query_size


def _adapter_bytes(
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
        return precision.attention * square * shape.traits.mask_types
    return square * min(kernels.count("efficient"), shape.traits.mask_types)


def rope_bytes(shape: ModelShape, precision: Precision, batch: Batch) -> int:
    """Cosines and sines, s x rotary_dim each; Gemma 3 has two sets."""
    return 2 * precision.residual * batch.sequence * shape.rotary_dim * shape.traits.rope_types


def input_needs_gradient(spec: JobSpec, shape: ModelShape) -> bool:
    """Whether the first layer's input gets a gradient: the embedding is trained or adapted."""
    return any(tensor.module.is_token_embedding for tensor in trainable_tensors(shape, spec.lora))
