"""What bitsandbytes' layers take in a step beyond their weights: whole weights dequantized, inputs that int8 holds.

Read in bitsandbytes 0.50 (autograd/_functions.py, nn/modules.py) and PEFT 0.21 (tuners/lora/bnb.py); compared with
traces of them. Letters as in activations.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_jobs.sizing.precision import HALF, SINGLE

if TYPE_CHECKING:
    from lora_jobs.sizing.activations import Batch
    from lora_jobs.sizing.models import ModelShape
    from lora_jobs.sizing.precision import Precision
    from lora_jobs.spec.job import JobSpec


def held_inputs(spec: JobSpec, shape: ModelShape, precision: Precision) -> int:
    """Bytes per token of one layer that LLM.int8() keeps from forward to the end of the backward pass.

    MatMul8bitLt puts its input on the graph's node itself, so checkpointing does not drop it, and it goes with the
    graph: the inputs of q, k, v; of gate and up; of down; of o, which is what attention gives.
    """
    if not _is_int8(spec):
        return 0
    output = precision.attention * shape.query_size
    return 2 * normed_input(spec, shape, precision) + precision.output * shape.intermediate_size + output


def normed_input(spec: JobSpec, shape: ModelShape, precision: Precision) -> int:
    """Bytes per token of one held input that a norm gives; where the layer's input needs no gradient none is held."""
    return precision.residual * shape.hidden_size if _is_int8(spec) else 0


def attention_output(spec: JobSpec, shape: ModelShape, precision: Precision) -> int:
    """Bytes per token of the held input that attention saves, too; fused projections' queries make it a copy."""
    if not _is_int8(spec) or shape.traits.fused_projections:
        return 0
    return precision.attention * shape.query_size


def _is_int8(spec: JobSpec) -> bool:
    return spec.model.quantization is not None and spec.model.quantization.load_in_8bit


def mlp_backward(spec: JobSpec, shape: ModelShape, precision: Precision, batch: Batch, *, adapted: bool) -> int:
    """Bytes per token at the worst moment of an MLP's backward pass, beside what the layer saved: computing down_proj
    again, its input's gradients added up, or its weight dequantized.
    """
    h, i, output = shape.hidden_size, shape.intermediate_size, precision.output
    if not adapted:
        return max(3 * output * i, 2 * HALF * i + _dequantized(spec, shape, precision, batch))
    dropout = spec.lora.lora_dropout > 0
    kept = precision.lora_input + (1 if dropout else 0)
    is_cast = output != precision.lora_input
    added = (3 * output - kept) * i
    gradient = output if _is_int8(spec) else HALF
    dequantized = (output + gradient - kept) * i + _dequantized(spec, shape, precision, batch)
    if not spec.training.activation_checkpointing:
        return max(added, dequantized)
    copies = (1 if dropout or is_cast else 0) + (1 if dropout and is_cast else 0)
    # The stream, its gradient, the base's output and the adapter's; a fp32 stream is the checkpoint itself. Of four
    # norms the last one has its input and gradient still to come.
    streams = 3 * precision.residual + HALF - (SINGLE if precision.residual == SINGLE else 0)
    if shape.traits.norms_per_layer == 4:
        streams -= SINGLE + HALF
    return max(added, dequantized, copies * output * i + streams * h)


def _dequantized(spec: JobSpec, shape: ModelShape, precision: Precision, batch: Batch) -> int:
    """A whole down_proj, spread over the tokens: int8 in the inputs' dtype, 4 bits in half and its gradient with it."""
    weights = shape.hidden_size * shape.intermediate_size
    width = precision.output if _is_int8(spec) else HALF
    return -(-width * weights // batch.tokens)


def evaluated_mlp(spec: JobSpec, shape: ModelShape, precision: Precision) -> int:
    """Bytes per token of an MLP without gradients: the activation, up_proj's output, its sum with the adapter's and
    that (a fused gate_up_proj's are twice as wide, and come before the activation); in int8 the input's copy as well.
    """
    outputs = 2 * precision.output + HALF
    widths = 2 * outputs if shape.traits.fused_projections else outputs + precision.output
    return widths * shape.intermediate_size + (shape.hidden_size if _is_int8(spec) else 0)
