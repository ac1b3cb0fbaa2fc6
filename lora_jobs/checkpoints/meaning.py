"""Do the parts of a checkpoint tell one story? Same step, same world, same weights, all finite. Needs torch."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from lora_jobs.checkpoints.loading import DUMMY_STEPS, load_torch_file
from lora_jobs.checkpoints.structure import load_trainer_state
from lora_jobs.checkpoints.tensors import ADAPTER_WEIGHTS
from lora_jobs.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

# Under ZeRO-3 each rank writes model states of its own.
_MODEL = re.compile(r"[^/]+/(?:zero_pp_rank_(\d+)_)?mp_rank_00_model_states\.pt")
_SHARD = re.compile(r"[^/]+/(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")


class Sharded(Struct, frozen=True):
    """DeepSpeed's part: what the model states say (one, or one of each rank), and the optimizer's state by its place:
    the shard of each rank in their order, or without ZeRO the whole of it.
    """

    models: tuple[Mapping[str, Any], ...]
    optimizers: Mapping[str, Mapping[str, Any]]

    @property
    def skipped(self) -> int:
        """Steps that the loss scaler of fp16 left out: optimizer and scheduler did not take them."""
        return int(self.models[0].get("skipped_steps") or 0)


def check_meaning(directory: Path, names: Collection[str], *, step: int, world_size: int) -> None:
    """CheckpointError, in words, at the first thing that contradicts another.

    Looked at are the files that are there: step in trainer_state.json, the scheduler, DeepSpeed's counters and the
    optimizer; world size; the adapter against DeepSpeed's module and that against its fp32 master; finite values;
    lora_B no longer zero.
    """
    adapter = _load_adapter(directory) if ADAPTER_WEIGHTS in names else {}
    for key, tensor in adapter.items():
        _require_finite(tensor, f"{ADAPTER_WEIGHTS}: {key}")
    if step > 1:
        _check_trained(adapter)
    if "trainer_state.json" not in names:
        return
    _require_equal("global_step of trainer_state.json", load_trainer_state(directory).get("global_step"), step)
    sharded = _load_sharded(directory, names)
    _check_scheduler(directory, names, step, sharded)
    if sharded is None:
        if "optimizer.pt" in names:
            state = load_torch_file(directory / "optimizer.pt", "optimizer.pt")
            # fp16's loss scaler skips steps, and keeps its count elsewhere.
            _check_optimizer(state, "optimizer.pt", None if "scaler.pt" in names else step)
        return
    for model in sharded.models:
        _require_equal("global_steps of DeepSpeed", model.get("global_steps"), step)
        _require_equal("dp_world_size of DeepSpeed", model.get("dp_world_size"), world_size)
        _require_equal("skipped_steps of DeepSpeed", int(model.get("skipped_steps") or 0), sharded.skipped)
        _require_finite_values(model.get("module"), "DeepSpeed's module")
    for where, state in sharded.optimizers.items():
        _check_optimizer(_find_inner(state), where, step - sharded.skipped + _count_dummies(state))
        _require_finite_values(state, where)
    if len(sharded.models) == 1:
        module = {key: value for key, value in (sharded.models[0].get("module") or {}).items() if value is not None}
        _compare_adapter(adapter, module)
        _compare_master(module, tuple(sharded.optimizers.values()))


def _load_adapter(directory: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(directory / ADAPTER_WEIGHTS))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{ADAPTER_WEIGHTS} does not load: {error}", path=directory) from error


def _load_sharded(directory: Path, names: Collection[str]) -> Sharded | None:
    ranked = sorted((int(match[1] or 0), name) for name in names if (match := _MODEL.fullmatch(name)))
    if not ranked:
        return None
    models = tuple(load_torch_file(directory / name, name) for _, name in ranked)
    shards = sorted((int(match[1]), name) for name in names if (match := _SHARD.fullmatch(name)))
    states = {
        f"the optimizer shard of rank {rank}": load_torch_file(directory / name, name).get("optimizer_state_dict")
        for rank, name in shards
    } or {"DeepSpeed's optimizer": models[0].get("optimizer")}
    if empty := next((where for where, state in states.items() if not state), None):
        raise CheckpointError(f"{empty} holds no state")
    return Sharded(models, states)


def _find_inner(state: Mapping[str, Any]) -> Any:
    """The state of torch's optimizer in what DeepSpeed wraps around it: ZeRO-1 and 2, ZeRO-3 and fp16, or nothing."""
    return state.get("base_optimizer_state") or state.get("optimizer_state_dict") or state


def _count_dummies(state: Mapping[str, Any]) -> int:
    """ZeRO's states name their stage; half precision without ZeRO wraps the optimizer too."""
    return DUMMY_STEPS if "optimizer_state_dict" in state and "zero_stage" not in state else 0


def _check_scheduler(directory: Path, names: Collection[str], step: int, sharded: Sharded | None) -> None:
    if "scheduler.pt" not in names or "scaler.pt" in names:
        return
    state = load_torch_file(directory / "scheduler.pt", "scheduler.pt")
    wanted = step if sharded is None else step - sharded.skipped
    if isinstance(state, dict) and isinstance(state.get("last_epoch"), int):
        _require_equal("last_epoch of scheduler.pt", state["last_epoch"], wanted)


def _check_optimizer(state: Any, where: str, step: int | None) -> None:
    """`state` is that of a torch optimizer, or a list of them; a step of None is not compared."""
    for inner in state if isinstance(state, list) else [state]:
        moments = inner.get("state", {}) if isinstance(inner, dict) else {}
        if step and not moments and any("betas" in group for group in _list_groups(inner)):
            raise CheckpointError(f"{where} holds no moments at step {step}")
        for name, values in moments.items():
            if step is not None and isinstance(values, dict) and "step" in values:
                _require_equal(f"step of parameter {name} in {where}", int(values["step"]), step)
    _require_finite_values(state, where)


def _list_groups(optimizer: Any) -> list[Mapping[str, Any]]:
    return list(optimizer.get("param_groups", ())) if isinstance(optimizer, dict) else []


def _check_trained(adapter: Mapping[str, Tensor]) -> None:
    """PEFT starts every lora_B at zero; the first step may have a learning rate of zero (warm-up), the second not."""
    grown = [tensor for key, tensor in adapter.items() if ".lora_B." in key or ".lora_embedding_B" in key]
    if grown and not any(bool(tensor.any()) for tensor in grown):
        raise CheckpointError(f"{ADAPTER_WEIGHTS}: every lora_B is zero, as before the first step")


def _compare_adapter(adapter: Mapping[str, Tensor], module: Mapping[str, Tensor]) -> None:
    """PEFT's file leaves the adapter's name out of the keys; every trained tensor of the module has to be in it."""
    import torch

    if not adapter:
        return
    named = {key.replace(".modules_to_save", "").replace(".default", ""): value for key, value in module.items()}
    for key, value in named.items():
        if ".lora_" not in key and key not in adapter:
            continue
        if key not in adapter:
            raise CheckpointError(f"{ADAPTER_WEIGHTS} has no {key}, DeepSpeed's module has")
        saved = adapter[key]
        if saved.shape != value.shape or not torch.equal(saved, value.to(saved.dtype)):
            raise CheckpointError(f"{ADAPTER_WEIGHTS}: {key} is not what DeepSpeed's module holds")
    if missing := sorted(key for key in adapter if ".lora_" in key and key not in named):
        raise CheckpointError(f"DeepSpeed's module has no {missing[0]}, {ADAPTER_WEIGHTS} has")


def _compare_master(module: Mapping[str, Tensor], optimizers: tuple[Mapping[str, Any], ...]) -> None:
    """ZeRO-1 and 2: the fp32 master, put together from the ranks' pieces, is the module once it is cast."""
    import torch

    pieces: dict[str, list[Tensor]] = {}
    for shard in optimizers:
        groups = shard.get("single_partition_of_fp32_groups") or []
        for flat, places in zip(groups, shard.get("param_slice_mappings") or [], strict=False):
            for name, place in places.items():
                pieces.setdefault(name, []).append(flat[place.start : place.start + place.numel])
    for name, parts in pieces.items():
        value = module.get(name)
        if value is None:
            continue
        master = torch.cat(parts)
        if master.numel() != value.numel() or not torch.equal(master.to(value.dtype), value.flatten()):
            raise CheckpointError(f"the fp32 master of {name} is not what DeepSpeed's module holds")


def _require_finite_values(value: Any, where: str) -> None:
    for name, tensor in _walk_tensors(value, ""):
        _require_finite(tensor, f"{where}: {name}")


def _walk_tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    import torch

    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _walk_tensors(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _walk_tensors(inner, f"{name}[{number}]")


def _require_finite(tensor: Tensor, where: str) -> None:
    """One pass: the smallest and the largest value are NaN where any value is, and infinite where one is."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    low, high = tensor.aminmax()
    if not (low.isfinite() and high.isfinite()):
        raise CheckpointError(f"{where} is not finite")


def _require_equal(what: str, seen: Any, wanted: int) -> None:
    if seen != wanted:
        raise CheckpointError(f"{what} is {seen}, wanted {wanted}")
