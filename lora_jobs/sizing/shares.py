"""How ZeRO divides what is trained among the ranks, and what that makes a rank keep of the gradients."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from msgspec import Struct

from lora_jobs.sizing.modules import HEAD
from lora_jobs.sizing.parameters import TrainableTensor, trainable_tensors

if TYPE_CHECKING:
    from lora_jobs.sizing.models import ModelShape
    from lora_jobs.spec.job import LoraSpec


class Share(Struct, frozen=True):
    """Elements of the gradients that one ZeRO rank keeps, and of the largest of them that it steps.

    It steps an equal share of all elements, but keeps the whole gradient of every tensor that it has a part of.
    Source: copy_grads_in_partition and get_grad_norm_direct of stage_1_and_2.py, DeepSpeed 0.19.
    """

    kept: int
    largest: int


@lru_cache(maxsize=64)
def list_shares(shape: ModelShape, lora: LoraSpec, ranks: int) -> tuple[Share, ...]:
    """The share of every rank."""
    tensors = sorted(trainable_tensors(shape, lora), key=_place_in_model)
    size = max(1, -(-sum(tensor.elements for tensor in tensors) // ranks))
    kept, largest, start = [0] * ranks, [0] * ranks, 0
    for tensor in tensors:
        end = start + tensor.elements
        for rank in range(start // size, (end - 1) // size + 1):
            kept[rank] += tensor.elements
            largest[rank] = max(largest[rank], min(end, (rank + 1) * size) - max(start, rank * size))
        start = end
    return tuple(map(Share, kept, largest))


def _place_in_model(tensor: TrainableTensor) -> int:
    """The embedding's copy before the layers, the output layer's after them."""
    return 0 if tensor.module.is_token_embedding else 2 if tensor.module.name == HEAD else 1
