"""One layer's bytes: what its forward pass saves, and what lives at the worst moments of its forward and backward.

Letters as in activations.py. Source: traces of transformers' and PEFT's own code, torch's allocated bytes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from msgspec import Struct

from lora_jobs.sizing import dora, quantized
from lora_jobs.sizing.activations import (
    GATE_UP,
    QKV,
    Attention,
    Batch,
    adapter_bytes,
    attention_bytes,
    choose_kernel,
    expanded_keys,
    head_norm_bytes,
    norm_bytes,
    norms_bytes,
)
from lora_jobs.sizing.dora import DoraMoment
from lora_jobs.sizing.parameters import trainable_tensors
from lora_jobs.sizing.precision import HALF, SINGLE, Precision

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_jobs.sizing.gpus import Gpu
    from lora_jobs.sizing.models import ModelShape
    from lora_jobs.spec.job import JobSpec, LoraSpec


class LayerCost(Struct, frozen=True):
    """Bytes per token of one layer, by what keeps them."""

    norms: int
    attention: int
    mlp: int
    adapters: int
    adapter_elements: int
    """LoRA parameters of the layer."""
    dora_moments: tuple[DoraMoment, ...]
    """Where DoRA rebuilds a weight, module by module, and after the last of them; empty without DoRA."""
    mlp_forward: int
    """Live at the worst moment of the MLP's forward where nothing is saved (a base that is not quantized)."""
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

    @property
    def dora(self) -> int:
        """Bytes (not per token) that DoRA keeps of the layer."""
        return self.dora_moments[-1].kept if self.dora_moments else 0

    @property
    def dora_peak(self) -> DoraMoment | None:
        """The forward pass's largest moment with a rebuilt weight."""
        return max(self.dora_moments, key=lambda moment: moment.total, default=None)


class _Adapted(Struct, frozen=True):
    """The adapters of one layer: rank by projection, and all their parameters."""

    ranks: tuple[tuple[str, int], ...]
    elements: int


class _Kind(Struct, frozen=True):
    """Layers that cost the same: their adapters, whether they attend within a window, and the first that is so."""

    adapted: _Adapted
    sliding: bool
    layer: int


@lru_cache(maxsize=64)  # a dozen changes are tried on a job, and few of them change this
def _list_kinds(shape: ModelShape, lora: LoraSpec) -> tuple[_Kind, ...]:
    """The kind of every layer, equal ones the same object."""
    kinds: dict[tuple[_Adapted, bool], _Kind] = {}
    found = []
    for layer, adapted in enumerate(_list_adapted(shape, lora)):
        sliding = shape.slides(layer)
        found.append(kinds.setdefault((adapted, sliding), _Kind(adapted, sliding, layer)))
    return tuple(found)


def _list_adapted(shape: ModelShape, lora: LoraSpec) -> tuple[_Adapted, ...]:
    ranks: list[dict[str, int]] = [{} for _ in range(shape.num_hidden_layers)]
    elements = [0] * shape.num_hidden_layers
    for tensor in trainable_tensors(shape, lora):
        if tensor.part == "lora" and tensor.module.layer is not None:
            if tensor.rank:
                ranks[tensor.module.layer][tensor.module.leaf] = tensor.rank
            elements[tensor.module.layer] += tensor.elements
    return tuple(_Adapted(tuple(named.items()), total) for named, total in zip(ranks, elements, strict=True))


def layer_costs(spec: JobSpec, shape: ModelShape, gpu: Gpu, precision: Precision, batch: Batch) -> list[LayerCost]:
    """The cost of every layer; layers differ by window and by which of their projections carry an adapter."""
    kinds = _list_kinds(shape, spec.lora)
    costs: dict[int, LayerCost] = {}
    for kind in kinds:
        if kind.layer not in costs:
            kernel = choose_kernel(spec, shape, gpu, batch, sliding=kind.sliding)
            costs[kind.layer] = _layer_cost(spec, shape, precision, batch, kernel, kind)
    return [costs[kind.layer] for kind in kinds]


def _list_dora_moments(
    spec: JobSpec,
    shape: ModelShape,
    precision: Precision,
    batch: Batch,
    kernel: Attention,
    targets: Mapping[str, int],
    layer: int,
) -> tuple[DoraMoment, ...]:
    """One per adapted module, in the order in which they run, with what the layer has saved by then."""
    if not spec.lora.use_dora:
        return ()
    order = {leaf: number for number, leaf in enumerate((*QKV, "o_proj", *GATE_UP, "down_proj"))}
    found = {
        tensor.module
        for tensor in trainable_tensors(shape, spec.lora)
        if tensor.part == "lora" and tensor.module.layer == layer and tensor.module.leaf in order
    }
    modules = sorted(found, key=lambda module: order[module.leaf])
    dropout = spec.lora.lora_dropout > 0
    kept = 0
    moments = []
    for module in modules:
        earlier = {leaf: rank for leaf, rank in targets.items() if order.get(leaf, 0) < order[module.leaf]}
        saved = _saved_before(shape, precision, batch, kernel, module.leaf)
        saved += adapter_bytes(spec, shape, precision, kernel, earlier) if earlier else 0
        saved += _beside(shape, precision, module.leaf) + (module.fan_in if dropout else 0)
        saved += precision.output * module.fan_out
        rebuilt = dora.rebuilding_bytes(module, precision, batch.tokens, dropout=dropout)
        moments.append(DoraMoment(saved * batch.tokens, kept, rebuilt))
        kept += dora.saved_bytes(module, precision, batch.tokens, dropout=dropout)
    return (*moments, DoraMoment(0, kept, 0)) if moments else ()


def _saved_before(shape: ModelShape, precision: Precision, batch: Batch, kernel: Attention, leaf: str) -> int:
    """Bytes per token that a layer has saved when this projection runs, adapters' inputs apart."""
    one_norm = norm_bytes(shape.hidden_size)
    if leaf in QKV:
        return one_norm
    saved = attention_bytes(shape, precision, batch, kernel) + head_norm_bytes(shape)
    if leaf == "o_proj":
        return saved + one_norm
    saved += one_norm * (2 if shape.traits.norms_per_layer == 2 else 3)
    return saved + (3 * precision.output * shape.intermediate_size if leaf == "down_proj" else 0)


def _beside(shape: ModelShape, precision: Precision, leaf: str) -> int:
    """Bytes per token that live while this projection runs and are not saved: the stream, what the norm before it
    gave, gate's values while up runs, the product that down gets.
    """
    stream = precision.residual * shape.hidden_size
    values = precision.output * shape.intermediate_size
    if leaf not in (*GATE_UP, "down_proj"):
        return stream
    return 2 * stream + {"up_proj": 2 * values, "down_proj": values}.get(leaf, 0)


def _layer_cost(
    spec: JobSpec,
    shape: ModelShape,
    precision: Precision,
    batch: Batch,
    kernel: Attention,
    kind: _Kind,
) -> LayerCost:
    adapted = kind.adapted
    targets = dict(adapted.ranks)
    h, i = shape.hidden_size, shape.intermediate_size
    dropout = 1 if spec.lora.lora_dropout > 0 else 0
    adapters = adapter_bytes(spec, shape, precision, kernel, targets)
    attention = attention_bytes(shape, precision, batch, kernel)
    in_qkv = {name: rank for name, rank in targets.items() if name in QKV}
    return LayerCost(
        norms=norms_bytes(shape),
        attention=attention,
        mlp=3 * precision.output * i,
        adapters=adapters,
        adapter_elements=adapted.elements,
        dora_moments=_list_dora_moments(spec, shape, precision, batch, kernel, targets, kind.layer),
        mlp_forward=_mlp_forward(shape, precision, targets, dropout=bool(dropout)),
        mlp_backward=_mlp_backward(spec, shape, precision, batch, adapted="down_proj" in targets),
        attention_backward=_eager_backward(
            shape, precision, batch, adapter_bytes(spec, shape, precision, kernel, in_qkv)
        )
        if kernel == "eager"
        else 0,
        fused_gate="gate_up_proj" in targets,
        first_unneeded=norm_bytes(h) + dropout * h * len(in_qkv),
    )


def _eager_backward(shape: ModelShape, precision: Precision, batch: Batch, qkv_adapters: int) -> int:
    """Bytes per token of eager attention's backward pass: the scores of every head, in fp32 and the attention's dtype,
    beside the inputs that the layer has saved; `qkv_adapters` are those of its projections. Source: traced.
    """
    h = shape.hidden_size
    scores = 3 * SINGLE if not shape.traits.attention_soft_cap else 3 * SINGLE + HALF
    return (
        norm_bytes(h)
        + head_norm_bytes(shape)
        + qkv_adapters
        + precision.residual * h
        + 2 * precision.attention * shape.query_size
        + precision.attention * expanded_keys(shape, batch) // 2
        + scores * precision.attention // HALF * shape.num_attention_heads * batch.sequence
    )


def _mlp_forward(shape: ModelShape, precision: Precision, targets: Mapping[str, int], *, dropout: bool) -> int:
    """The stream beside the largest of three moments: gate times up; an adapter's output added to theirs (in the dtype
    that it comes in, before and after its scaling); down_proj with its adapter's copies of the input. What a fused
    gate_up_proj gives lives on to the end, as both halves are views of it. Source: PEFT's Linear.forward; traced.
    """
    h, i, out = shape.hidden_size, shape.intermediate_size, precision.output
    fused = shape.traits.fused_projections
    casts_input = precision.adapter != out
    most = (4 if fused else 3) * out * i + 2 * precision.residual * h
    if any(name in targets for name in GATE_UP):
        delta = HALF if precision.casts_adapters else precision.adapter
        added = (2 * out + 4 * delta if fused else 2 * out + 2 * delta) * i
        most = max(most, added + (2 * precision.residual + (precision.adapter if casts_input else 0)) * h)
    if "down_proj" in targets:
        copies = precision.adapter * (casts_input + dropout) + (HALF if precision.casts_adapters else 0)
        most = max(most, ((3 if fused else 1) * out + copies) * i + (2 * precision.residual + out) * h)
    return most


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
