"""What a trace can tell apart: the tensors that stay, by what they are for. Activations only show in the peaks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from lora_jobs.training.trace.allocator import BLOCK_BYTES
from lora_jobs.training.trace.quantize import list_state

if TYPE_CHECKING:
    from collections.abc import Iterable


def count_held(model: Any, optimizer: torch.optim.Optimizer | None) -> dict[str, int]:
    """Bytes of the base (with its quantization state and buffers), of what is trained, and of the optimizer's state,
    by the closed form's names.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    held = {
        "base_weights": _count_bytes([*frozen, *model.buffers(), *list_state(model)]),
        "trainable_weights": _count_bytes(trained),
    }
    if optimizer is not None:
        held["optimizer_state"] = _count_bytes(tree_leaves(dict(optimizer.state)))
    return held


def count_gradients(model: Any) -> int:
    """Bytes of every gradient that is there."""
    return _count_bytes(parameter.grad for parameter in model.parameters())


def _count_bytes(tensors: Iterable[Any]) -> int:
    """On the GPU, in the allocator's blocks; tensors that share a storage count once."""
    sizes = {}
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
            storage = tensor.untyped_storage()
            sizes[storage._cdata] = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
    return sum(sizes.values())
