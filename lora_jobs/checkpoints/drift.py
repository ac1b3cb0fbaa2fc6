"""What changed between the spec that a checkpoint was trained with and the spec of now, and whether that is safe."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct

from lora_jobs.checkpoints.inputs import fingerprint_inputs, stored_inputs_path, stored_spec_path
from lora_jobs.checkpoints.manifest import MANIFEST, load_manifest
from lora_jobs.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from lora_jobs.runs import Run
    from lora_jobs.spec import JobSpec

ALLOWED_FILE = "allowed_drift.json"
Kind = Literal["free", "allowed_with_flag", "forbidden"]

_OTHER_WEIGHTS = "the checkpoint's weights belong to the stored value"
_OTHER_STATE = "the checkpoint's optimizer and scheduler state holds the stored value; a new one would not take effect"
_NEW_SCHEDULE = "the rest of the schedule is computed from the new value; the optimizer's moments stay"
_OTHER_DATA = "the rows still to come would not be the ones that are left"
_OTHER_RESULT = "training goes on, but not to the result of the stored spec"
_NO_EFFECT = "does not change what is learned"

# One row a key, or a whole section; the longest key that fits counts. Trainer, PEFT and DeepSpeed accept most of the
# changes that are not free without a word, and train on from state that belongs to something else.
_RULES: dict[str, tuple[Kind, str]] = {
    "name": ("free", _NO_EFFECT),
    "model": ("forbidden", _OTHER_WEIGHTS),
    "model.attn_implementation": ("allowed_with_flag", _OTHER_RESULT),
    "model.device_map": ("free", _NO_EFFECT),
    "model.low_cpu_mem_usage": ("free", _NO_EFFECT),
    "model.trust_remote_code": ("allowed_with_flag", _OTHER_RESULT),
    "lora": ("forbidden", _OTHER_WEIGHTS),
    "lora.lora_dropout": ("allowed_with_flag", _OTHER_RESULT),
    "data": ("allowed_with_flag", _OTHER_DATA),
    "data.eval": ("free", _NO_EFFECT),
    "training": ("allowed_with_flag", _OTHER_RESULT),
    "training.per_device_train_batch_size": ("allowed_with_flag", _OTHER_DATA),
    "training.gradient_accumulation_steps": ("allowed_with_flag", _OTHER_DATA),
    "training.seed": ("allowed_with_flag", _OTHER_DATA),
    "training.learning_rate": ("allowed_with_flag", _NEW_SCHEDULE),
    "training.weight_decay": ("forbidden", _OTHER_STATE),
    "training.adam_beta1": ("forbidden", _OTHER_STATE),
    "training.adam_beta2": ("forbidden", _OTHER_STATE),
    "training.adam_epsilon": ("forbidden", _OTHER_STATE),
    "training.optim": ("forbidden", _OTHER_STATE),
    "training.bf16": ("forbidden", _OTHER_STATE),
    "training.fp16": ("forbidden", _OTHER_STATE),
    "training.per_device_eval_batch_size": ("free", _NO_EFFECT),
    "training.eval_accumulation_steps": ("free", _NO_EFFECT),
    "training.activation_checkpointing": ("free", _NO_EFFECT),
    "training.logging_steps": ("free", _NO_EFFECT),
    "training.save_steps": ("free", _NO_EFFECT),
    "training.dataloader_num_workers": ("free", _NO_EFFECT),
    "training.dataloader_pin_memory": ("free", _NO_EFFECT),
    "training.torch_empty_cache_steps": ("free", _NO_EFFECT),
    "training.report_to": ("free", _NO_EFFECT),
    "training.final_metrics": ("free", _NO_EFFECT),
    "training.final_examples": ("free", _NO_EFFECT),
    "training.max_new_tokens": ("free", _NO_EFFECT),
    "training.targets": ("free", _NO_EFFECT),
    "deepspeed": ("forbidden", "with and without DeepSpeed the optimizer state is in other files"),
    "deepspeed.zero_stage": ("forbidden", "each ZeRO stage splits the optimizer state in another way"),
    "deepspeed.torch_autocast": ("forbidden", "the weights are stored in another precision"),
    "deepspeed.offload_optimizer": ("allowed_with_flag", _OTHER_RESULT),
    "deepspeed.allgather_bucket_size": ("free", _NO_EFFECT),
    "deepspeed.reduce_bucket_size": ("free", _NO_EFFECT),
    "deepspeed.overlap_comm": ("free", _NO_EFFECT),
    "deepspeed.contiguous_gradients": ("free", _NO_EFFECT),
    "resources": ("free", _NO_EFFECT),
    "resume": ("free", _NO_EFFECT),
    "sweep": ("free", _NO_EFFECT),
}
_NOT_LISTED: tuple[Kind, str] = ("allowed_with_flag", _OTHER_RESULT)
_WORLD = frozenset({"resources.nodes", "resources.gpus_per_node"})
WORLD_KEYS = (*sorted(_WORLD), "training.gradient_accumulation_steps")
"""What `resume --gpus` changes together, so that the global batch stays."""


class Drift(Struct, frozen=True):
    """One key that differs; `kind` says whether resuming is fine, needs the user's word, or can't be right."""

    key: str
    stored: Any
    present: Any
    kind: Kind
    why: str

    def to_json(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "stored": self.stored,
            "present": self.present,
            "kind": self.kind,
            "why": self.why,
        }


def find_drift(stored: JobSpec, present: JobSpec) -> list[Drift]:
    """Every key whose meaning differs, in the order of the spec."""
    found = []
    for key, old, new in _compare("", _values(stored), _values(present)):
        kind, why = _judge_world(stored, present) if key in _WORLD else find_rule(key)
        found.append(Drift(key, old, new, kind, why))
    return found


def find_run_drift(run: Run, checkpoint: Path | None, present: JobSpec) -> list[Drift]:
    """What differs between the attempt that committed the checkpoint and now: the spec, and its inputs' content.

    Without a checkpoint, or for one without a manifest or whose attempt left no spec, the run's own spec is compared.
    """
    from lora_jobs.spec import load_spec

    committed = checkpoint if checkpoint is not None and (checkpoint / MANIFEST).exists() else None
    number = load_manifest(committed).metadata.get("attempt") if committed is not None else None
    if not isinstance(number, int):
        return find_drift(load_spec(run.spec_path), present)
    path = stored_spec_path(run, number)
    found = find_drift(load_spec(path if path.is_file() else run.spec_path), present)
    inputs = stored_inputs_path(run, number)
    if inputs.is_file():
        named = {drift.key for drift in found}
        found += [
            drift for drift in find_other_inputs(json.loads(inputs.read_bytes()), present) if drift.key not in named
        ]
    return found


def find_other_inputs(stored: Mapping[str, str], present: JobSpec) -> Iterator[Drift]:
    """What lies at the same place and is something else now."""
    now = fingerprint_inputs(present)
    for key, digest in stored.items():
        if key in now and now[key] != digest:
            kind, why = find_rule(key)
            yield Drift(key, f"content {digest}", f"content {now[key]}", kind, why)


def list_allowed(run: Run, drift: Sequence[Drift], keys: Sequence[str]) -> dict[str, Any]:
    """The drift that somebody has allowed: named in `keys` now, or named before for this very value."""
    path = run.directory / ALLOWED_FILE
    before: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {
        change.key: change.present
        for change in drift
        if change.key in keys or (change.key in before and before[change.key] == change.present)
    }


def refuse_drift(drift: Sequence[Drift], allowed: Mapping[str, Any]) -> None:
    """RunError where a changed key would train something else than the checkpoint holds."""
    open_changes = [change for change in drift if change.key not in allowed]
    world = [change for change in open_changes if change.key in WORLD_KEYS and change.kind == "forbidden"]
    forbidden = [change for change in drift if change.kind == "forbidden" and change.key not in WORLD_KEYS]
    asking = [change for change in open_changes if change.kind == "allowed_with_flag"]
    if forbidden:
        keys = "; ".join(f"{c.key}: checkpoint has {c.stored}, now {c.present}" for c in forbidden)
        raise RunError(f"the checkpoint does not match the spec: {keys}", hint="submit this as a new run")
    if world:
        keys = "; ".join(f"{c.key}: {c.why}" for c in world)
        raise RunError(
            f"another number of processes: {keys}",
            hint="go on with as many as before, or `--gpus N` converts the checkpoint and keeps the global batch",
        )
    if asking:
        keys = "; ".join(f"{c.key}: was {c.stored}, now {c.present}" for c in asking)
        flags = " ".join(f"--allow-drift {c.key}" for c in asking)
        raise RunError(f"this changes how the run trains on: {keys}", hint=f"if that is meant: {flags}")


def find_rule(key: str) -> tuple[Kind, str]:
    """The row for a dotted key: its own, else that of the section it is in."""
    while key:
        if key in _RULES:
            return _RULES[key]
        key = key.rpartition(".")[0]
    return _NOT_LISTED


def _judge_world(stored: JobSpec, present: JobSpec) -> tuple[Kind, str]:
    """Nodes and GPUs may be arranged anew; another number of processes is another matter."""
    if stored.resources.world_size == present.resources.world_size:
        return "free", "the number of processes is the same"
    if stored.deepspeed is not None and stored.deepspeed.zero_stage > 0:
        return "forbidden", f"the optimizer state is split over {stored.resources.world_size} processes"
    return "allowed_with_flag", _OTHER_DATA


def _values(spec: JobSpec) -> dict[str, Any]:
    """The spec as plain values; lora_alpha as the number that PEFT gets, written or not."""
    values = spec.to_values()
    values["lora"]["lora_alpha"] = spec.lora.alpha
    return values


def _compare(key: str, stored: Any, present: Any) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, stored, present) of every leaf that differs; a section that one side leaves out is one leaf."""
    if isinstance(stored, dict) and isinstance(present, dict):
        for name in dict.fromkeys([*stored, *present]):
            yield from _compare(f"{key}.{name}" if key else name, stored.get(name), present.get(name))
    elif stored != present:
        yield key, stored, present
