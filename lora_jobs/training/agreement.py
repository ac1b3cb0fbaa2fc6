"""What the ranks must agree on between steps, over a gloo group of its own: host memory, no GPU stream is touched."""

from __future__ import annotations

import random
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Iterator

# Rank 0 hashes a whole checkpoint while the others wait.
TIMEOUT = timedelta(hours=1)


class Agreement:
    """Collective decisions of all ranks; with one rank every question is its own. Every rank must build it."""

    def __init__(self, world_size: int) -> None:
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if world_size > 1 else None

    def any(self, wish: bool) -> bool:
        """True in every rank when it is true in at least one."""
        if self._group is None:
            return wish
        flag = torch.tensor([int(wish)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag.item())

    def gather(self, part: list[Any]) -> list[list[Any]]:
        """Every rank's list, in rank order, in every rank."""
        if self._group is None:
            return [part]
        parts: list[list[Any]] = [[] for _ in range(dist.get_world_size(self._group))]
        dist.all_gather_object(parts, part, group=self._group)
        return parts

    def wait(self) -> None:
        """Return once every rank is here."""
        self.any(False)


@contextmanager
def preserved_randomness() -> Iterator[None]:
    """Leave every random state as it was, so that what runs inside cannot change the training after it."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
