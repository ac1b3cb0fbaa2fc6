"""What DeepSpeed's ZeRO engine really holds: a few steps of a tiny model in ranks over gloo, its tensors summed.

`python zero_ranks.py RANKS` with one JSON spec a line on standard input answers one line of bytes each. A
case is a process of its own in every rank, forked from this one, as DeepSpeed keeps some settings for a whole process.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
import weakref
from typing import TYPE_CHECKING, Any

import deepspeed
import deepspeed.ops
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoConfig, AutoModelForCausalLM

from lora_jobs.rendering.deepspeed import build_deepspeed_config
from lora_jobs.spec import JobSpec, parse_spec
from lora_jobs.training.model import add_adapter

if TYPE_CHECKING:
    from collections.abc import Iterable

STEPS = 2
"""In the second one Adam's moments are there."""


def list_storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Bytes by storage: tensors that are views of one count once."""
    found = {}
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor):
            found[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
    return found


def count_bytes(tensors: Iterable[Any]) -> int:
    return sum(list_storages(tensors).values())


class Peak(TorchDispatchMode):
    """The most bytes at once of `known` tensors and of those that operations return, while it is entered."""

    def __init__(self, known: Iterable[Any]) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0
        for tensor in known:
            self._add(tensor)

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self.sizes.pop, storage._cdata, 0)
            self.peak = max(self.peak, sum(self.sizes.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, torch.Tensor) and not func.is_view:
                self._add(leaf)
        return result


def fill_settings(spec: JobSpec, hidden_size: int) -> dict[str, Any]:
    """The job's DeepSpeed JSON with its "auto" values as the Trainer fills them."""
    settings = build_deepspeed_config(spec)
    assert settings is not None
    zero = settings["zero_optimization"]
    if zero["reduce_bucket_size"] == "auto":
        zero["reduce_bucket_size"] = hidden_size**2
    settings |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": spec.training.gradient_accumulation_steps,
        "gradient_clipping": spec.training.max_grad_norm,
        "zero_allow_untested_optimizer": True,
    }
    if "bf16" in settings:
        settings["bf16"] = {"enabled": True}
    return settings


def measure(spec: JobSpec, ranks: int) -> dict[str, int]:
    """The most bytes in a rank, by the fields of sizing's State; `backward_gradients` is beside the buckets, `step` is
    the most that the averaged gradients and what the optimizer's step allocates take together.
    """
    config = AutoConfig.from_pretrained(spec.model.name_or_path)
    base = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, spec.model.dtype))
    model = add_adapter(base, spec, zero_stage=spec.deepspeed.zero_stage)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = spec.training.optim == "adamw_torch_fused"
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True if fused else None, foreach=None if fused else True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=fill_settings(spec, config.hidden_size))
    zero = engine.optimizer
    found = {"partition": 0, "reduce_buckets": 0, "backward_gradients": 0, "accumulated": 0, "gradients": 0, "step": 0}
    reduce = zero.reduce_ipg_grads

    def list_gradients() -> list[Any]:
        waiting = [parameter.grad for parameters in zero.previous_reduced_grads.values() for parameter in parameters]
        kept = [tensor for group in zero.all_grad_tensors.values() for tensor in group or ()]
        return [*waiting, *kept, getattr(zero, "grads_in_partition", None), *(parameter.grad for parameter in trained)]

    def look() -> None:
        buckets = list_storages(tensor for bucket in zero.ipg_buckets.values() for tensor in bucket.buffer)
        beside = {key: size for key, size in list_storages(list_gradients()).items() if key not in buckets}
        if found["partition"] == 0:  # as it is first seen
            found["partition"] = count_bytes([getattr(zero, "grads_in_partition", None)])
        found["reduce_buckets"] = max(found["reduce_buckets"], sum(buckets.values()))
        found["backward_gradients"] = max(found["backward_gradients"], sum(beside.values()))

    def reduce_seen(*args: Any, **options: Any) -> None:
        look()
        reduce(*args, **options)
        look()

    zero.reduce_ipg_grads = reduce_seen
    for _ in range(STEPS):
        for micro in range(spec.training.gradient_accumulation_steps):
            tokens = torch.arange(16).reshape(1, 16)
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            if micro < spec.training.gradient_accumulation_steps - 1:
                found["accumulated"] = count_bytes(list_gradients())
                engine.step()
        averaged = [tensor for group in zero.averaged_gradients.values() for tensor in group]
        found["gradients"] = count_bytes(averaged)
        with Peak(averaged) as peak:
            del averaged
            engine.step()
        found["step"] = peak.peak
    moments = [value for state in zero.optimizer.state.values() for value in state.values()]
    found["trainable"] = count_bytes(zero.bit16_groups_flat)
    found["optimizer"] = count_bytes([*zero.single_partition_of_fp32_groups, *moments])
    everywhere: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(everywhere, found)
    return {name: max(each[name] for each in everywhere) for name in found}


def run_rank(spec: JobSpec, rank: int, ranks: int, port: int, answers: int) -> int:
    """The forked child: its exit status."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    try:
        deepspeed.init_distributed("gloo")
        found = measure(spec, ranks)
        if rank == 0:
            os.write(answers, json.dumps(found).encode())
    except BaseException:  # noqa: BLE001 - a child must never go back into the parent's loop
        os.write(answers, b"{}")
        traceback.print_exc()
        return 1
    return 0


def run_case(spec: JobSpec, ranks: int) -> dict[str, int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    reading, writing = os.pipe()
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os._exit(run_rank(spec, rank, ranks, port, writing))
        children.append(child)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        raise RuntimeError(f"ranks ended with {codes}")
    return dict(json.loads(text))


def main() -> None:
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled for minutes
    for line in sys.stdin:
        answers.write(json.dumps(run_case(parse_spec(line, source="case"), int(sys.argv[1]))) + "\n")


main()
