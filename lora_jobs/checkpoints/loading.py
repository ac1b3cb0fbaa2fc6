"""Torch files as values, for reading only: tensors are real, everything of DeepSpeed's is a plain stand-in."""

from __future__ import annotations

import pickle
import types
from typing import TYPE_CHECKING, Any

from lora_jobs.checkpoints.pickles import ALLOWED_GLOBALS
from lora_jobs.checkpoints.structure import check_structure
from lora_jobs.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path


DUMMY_STEPS = 1
"""What the optimizer of DeepSpeed without ZeRO counts too many in half precision: it allocates its moments by a step
with gradients of zero. Source: deepspeed.runtime.fp16, initialize_optimizer_states.
"""


class StandIn:
    """Holds what a pickled object held, without its class."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        if f"{module} {name}" not in ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"{module}.{name} is not needed by a checkpoint")
        return StandIn if module.startswith("deepspeed.") else super().find_class(module, name)


def load_torch_file(path: Path, name: str) -> Any:
    """The values of a file of torch.save, its tensors mapped and not copied. Needs torch; runs nothing of the file.

    CheckpointError where its pickle names more than a checkpoint needs, or where it does not load.
    """
    import torch

    check_structure(path, name)
    module = types.ModuleType("restricted_pickle")
    module.Unpickler = _Unpickler  # type: ignore[attr-defined]
    module.load = pickle.load  # type: ignore[attr-defined]
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False, pickle_module=module)
    except Exception as error:
        # torch.load raises whatever the bytes lead to: KeyError, RuntimeError, UnpicklingError, ...
        text = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{name} does not load: {type(error).__name__}: {text}", path=path) from error
