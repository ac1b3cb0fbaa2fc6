"""What the loss takes: the logits of the stock loss, the tiles of TRL's fused one, or Liger's few rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from lora_jobs.sizing.precision import HALF, SINGLE, Precision

if TYPE_CHECKING:
    from lora_jobs.sizing.activations import Batch
    from lora_jobs.sizing.models import ModelShape
    from lora_jobs.spec.job import JobSpec

STOCK_FORWARD = 10
"""Bytes per logit at the end of the stock loss's forward: half logits, fp32 logits, fp32 log-probabilities."""

STOCK_BACKWARD = 12
"""Bytes per logit at log_softmax's backward: fp32 logits, log-probabilities and their gradient."""

STOCK_HEAD_BACKWARD = 6
"""Bytes per logit when the output layer's own gradient is computed: the gradient in fp32 and cast."""

SOFT_CAP = 2
"""Gemma 2's soft-cap keeps its tanh: two bytes more per logit."""

STOCK_EVALUATION = 10
"""Bytes per logit of an evaluation with labels; nothing is kept for a backward pass."""

TILE_TOKENS, TILE_COLUMNS = 4096, 32768
"""The fused loss works in tiles of this size. Source: trl/kernels/chunked_logprob.py, trl/trainer/utils.py (1.16.0)."""

CPU_TILE_COLUMNS = 4096
"""And of this width on a CPU, where training asks for it: a tile of a few hundred tokens stays in the caches."""

TILE_TEMPORARIES = 6
"""Without Triton (CPU) a tile passes through this many fp32 temporaries at once. Source: _backward_tile, read."""


class LossCost(Struct, frozen=True):
    """Bytes of the loss beside the saved activations, at each instant; `name` says which loss it is."""

    name: str
    forward: int
    backward: int
    head_backward: int
    """With a trained output layer: its gradient, and what lives beside it."""
    evaluation: int


def uses_fused_loss(spec: JobSpec) -> bool:
    """TRL's SFTTrainer never builds the logits; the plain Trainer does."""
    return spec.training.trainer == "trl"


def loss_cost(
    spec: JobSpec,
    shape: ModelShape,
    precision: Precision,
    batch: Batch,
    evaluation: Batch,
    *,
    head_gradient: int,
    on_cpu: bool,
) -> LossCost:
    """The cost of the loss that this job's trainer really computes."""
    if uses_fused_loss(spec):
        return _fused_loss(shape, precision, batch, evaluation, head_gradient=head_gradient, on_cpu=on_cpu)
    stock = _stock_loss(shape, precision, batch, evaluation, head_gradient=head_gradient)
    if not spec.training.use_liger_kernel:
        return stock
    return _liger_loss(shape, precision, batch, head_gradient=head_gradient, evaluation=stock.evaluation)


def _stock_loss(
    shape: ModelShape, precision: Precision, batch: Batch, evaluation: Batch, *, head_gradient: int
) -> LossCost:
    """The logits of every token; a fp32 output layer under autocast also as a half copy."""
    cap = SOFT_CAP if shape.traits.final_soft_cap else 0
    logits = batch.tokens * shape.vocab_size
    head = precision.attention * shape.vocab_size * shape.hidden_size if precision.casts_base else 0
    return LossCost(
        name="logits",
        forward=(STOCK_FORWARD + cap) * logits + head,
        backward=(STOCK_BACKWARD + cap) * logits + head,
        head_backward=STOCK_HEAD_BACKWARD * logits + head + head_gradient if head_gradient else 0,
        # Without gradients autocast's copy of the output layer goes as soon as it was used.
        evaluation=max(
            STOCK_EVALUATION * evaluation.tokens * shape.vocab_size,
            precision.attention * evaluation.tokens * shape.vocab_size + head,
        ),
    )


def _liger_loss(
    shape: ModelShape, precision: Precision, batch: Batch, *, head_gradient: int, evaluation: int
) -> LossCost:
    """Logits of as many rows as the hidden states have room for, and the gradient, which the forward pass makes too.
    An evaluation builds every logit. Source: liger_kernel/ops/fused_linear_cross_entropy.py and transformers/model,
    0.8.5, read.
    """
    h, vocabulary, tokens = shape.hidden_size, shape.vocab_size, batch.tokens
    rows = -(-tokens // -(-vocabulary // h))
    rows = min(tokens, 1 << (rows - 1).bit_length())
    gradient = precision.residual * h * tokens
    head = precision.attention * vocabulary * h if precision.casts_base else 0
    return LossCost(
        name="fused_loss",
        forward=gradient + precision.attention * rows * vocabulary + head + head_gradient,
        backward=gradient + head_gradient,
        head_backward=gradient + head_gradient if head_gradient else 0,
        evaluation=evaluation,
    )


def _fused_loss(
    shape: ModelShape, precision: Precision, batch: Batch, evaluation: Batch, *, head_gradient: int, on_cpu: bool
) -> LossCost:
    """Tiles over the hidden states of the scored tokens (every token: the most there can be), which a compact copy
    holds; in the backward their fp32 gradient, and the output layer's fp32 gradient (4 V h). Both are cast at the end,
    while the tile is still there.
    """
    h = shape.hidden_size
    hidden, tokens = precision.residual * h * batch.tokens, batch.tokens
    width = CPU_TILE_COLUMNS if on_cpu else TILE_COLUMNS
    logit = precision.attention + (TILE_TEMPORARIES * SINGLE if on_cpu else 0)
    tile = logit * width * min(tokens, TILE_TOKENS)
    columns = precision.attention * width * h if precision.casts_base else 0
    head = SINGLE * shape.vocab_size * h if head_gradient else 0
    cast = hidden if precision.residual == HALF else 0
    held = hidden + SINGLE * h * tokens + _cast_rows(shape, precision, tokens) + tile + head
    # The next tile's columns are cast while the last one's are still named.
    both = columns * (2 if shape.vocab_size > width else 1)
    evaluated = precision.residual * h * evaluation.tokens + _cast_rows(shape, precision, evaluation.tokens)
    return LossCost(
        name="fused_loss",
        forward=hidden + _cast_rows(shape, precision, tokens) + tile + columns,
        backward=held + max(both, columns + cast),
        head_backward=held + columns + cast + (head_gradient if precision.saved == HALF else 0) if head_gradient else 0,
        evaluation=evaluated + logit * width * min(evaluation.tokens, TILE_TOKENS) + columns,
    )


def _cast_rows(shape: ModelShape, precision: Precision, tokens: int) -> int:
    """The hidden states of a tile, where they are cast."""
    return precision.attention * min(tokens, TILE_TOKENS) * shape.hidden_size if precision.casts_base else 0
