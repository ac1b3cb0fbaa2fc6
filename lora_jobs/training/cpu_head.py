"""TRL's fused head on a CPU: it scores completions only, in tiles that stay in the caches, in few passes over each.

Off CUDA TRL scores the prompts as well, for devices that compile a kernel for every new shape; its tiles are made for a
GPU, and what folds them makes a new tensor at every step. Source: trl 1.16, trainer/utils.py (add_fused_lm_head) and
kernels/chunked_logprob.py. The loss and its gradients are the same.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from trl.kernels import chunked_logprob
from trl.trainer import utils

from lora_jobs.sizing.losses import CPU_TILE_COLUMNS

if TYPE_CHECKING:
    from torch import Tensor

_TRL_FORWARD, _TRL_BACKWARD = chunked_logprob._forward_tile, chunked_logprob._backward_tile
_RARE = ("HAS_SOFTCAP", "HAS_LOG_SUM_SQ_PROBS", "HAS_MEAN_LOGITS", "HAS_ENTROPY_GRAD")
"""Options that TRL's own functions see to, as they do to tiles of half precision."""


def fit_head_to_cpu() -> None:
    """From now on, in this process."""
    utils._use_triton = lambda _: True
    utils._CHUNKED_LOGPROB_CHUNK_SIZE = CPU_TILE_COLUMNS
    chunked_logprob._forward_tile = fold_forward
    chunked_logprob._backward_tile = fold_backward


def fold_forward(tile: Tensor, *rest: Any, **options: Any) -> None:
    """A tile (tokens x columns) of logits into the running maximum, sum of exponentials, their sum times the logit,
    the highest logit before the target and the target's, each one value a token. The tile is used up.
    """
    if tile.dtype != torch.float32 or any(options.get(name) for name in _RARE):
        _TRL_FORWARD(tile, *rest, **options)
        return
    _, targets, highest, exponentials, weighted, _, _, before, chosen, start, columns = rest
    _scale(tile, options)
    rows, places = _find_targets(targets, start, columns)
    chosen[rows] = tile[rows, places]
    largest = tile.amax(-1)
    if options["HAS_IS_TOP1"]:
        left = largest.masked_fill(targets < start + columns, -math.inf)
        earlier = torch.arange(columns) < places.unsqueeze(-1)
        left[rows] = tile[rows].masked_fill_(~earlier, -math.inf).amax(-1)
        torch.maximum(before, left, out=before)
    new = torch.maximum(highest, largest)
    shrunk = torch.exp(highest - new)
    below = tile.sub_(new.unsqueeze(-1))
    powers = torch.exp(below)
    total = powers.sum(-1)
    exponentials.mul_(shrunk).add_(total)
    if options["HAS_ENTROPY"]:
        weighted.mul_(shrunk).add_(powers.mul_(below).sum(-1)).add_(new * total)
    highest.copy_(new)


def fold_backward(tile: Tensor, *rest: Any, **options: Any) -> None:
    """A tile of logits becomes the gradient of the targets' log-probabilities by it: one at the target, less every
    column's probability.
    """
    if tile.dtype != torch.float32 or any(options.get(name) for name in _RARE) or not options["HAS_LOGPROB_GRAD"]:
        _TRL_BACKWARD(tile, *rest, **options)
        return
    _, targets, log_sum, _, gradients, _, start, columns = rest
    factor = _scale(tile, options) * gradients
    rows, places = _find_targets(targets, start, columns)
    tile.sub_(log_sum.unsqueeze(-1)).exp_().mul_(-factor.unsqueeze(-1))
    tile[rows, places] += factor[rows]


def _scale(tile: Tensor, options: dict[str, Any]) -> float:
    """The model's scale of its logits over the temperature, by which the tile is multiplied."""
    scale: float = options["logit_scale"] * options["inv_t"]
    if scale != 1:
        tile.mul_(scale)
    return scale


def _find_targets(targets: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor]:
    """The tokens whose target is in the tile, and their columns in it."""
    local = targets - start
    rows = ((local >= 0) & (local < columns)).nonzero().squeeze(-1)
    return rows, local[rows]
