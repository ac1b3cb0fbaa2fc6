"""The CUDA caching allocator's books over fake tensors: bytes allocated now, and their peak by named stretch."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

BLOCK_BYTES = 512
"""Every allocation is rounded up to this. Source: kMinBlockSize in c10/cuda/CUDACachingAllocator. What that allocator
does not split off a block of its large pool (less than 1 MiB) is not counted."""


class Books(TorchDispatchMode):
    """Counts each CUDA storage from the operation that returns it until nothing refers to it any more.

    What an operation allocates and frees inside itself is not seen, as no kernel runs; `inside` tells it for some.
    """

    def __init__(self, inside: Mapping[Any, Callable[..., int]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inside = inside
        self.allocated = 0
        self.peaks: dict[str, int] = {}
        self.stretch = "build"
        self._sizes: dict[int, int] = {}

    def enter(self, stretch: str) -> None:
        """Start a stretch: its peak counts from what is allocated now."""
        self.stretch = stretch
        self.peaks[stretch] = max(self.peaks.get(stretch, 0), self.allocated)

    def keep_only(self, tensors: list[torch.Tensor]) -> None:
        """Forget everything but these tensors (and what comes later)."""
        self._sizes.clear()
        self.allocated = 0
        for tensor in tensors:
            self._add(tensor)

    def _add(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "cuda":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
        self._sizes[key] = size
        self.allocated += size
        self.peaks[self.stretch] = max(self.peaks.get(self.stretch, 0), self.allocated)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.allocated -= self._sizes.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*_every_position(func, args), **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, torch.Tensor):
                self._verify_view(func, leaf)
                self._add(leaf)
        if func in self.inside:
            most = self.allocated + self.inside[func](*args, **(kwargs or {}))
            self.peaks[self.stretch] = max(self.peaks.get(self.stretch, 0), most)
        return result

    def _verify_view(self, func: Any, result: torch.Tensor) -> None:
        """A view allocates nothing: one with a storage of its own is a fault of the fake tensors, not of the code."""
        if not func.is_view or self.stretch == "build" or result.device.type != "cuda":
            return
        if result.untyped_storage()._cdata not in self._sizes and result.numel():
            raise RuntimeError(f"{func} gave a view of {tuple(result.shape)} whose storage nothing allocated")


def _every_position(func: Any, args: Any) -> Any:
    """Indexing by a mask asks for its values; here every position counts, the most there can be."""
    if func is not torch.ops.aten.index.Tensor:
        return args
    source, indices = args
    if not any(index is not None and index.dtype == torch.bool for index in indices):
        return args
    (mask,) = indices
    flat = source.reshape(-1, *source.shape[mask.dim() :])
    return flat, [torch.arange(flat.shape[0], device=source.device)]
