"""After a checkpoint was loaded, before the first step: is what is in memory what was committed? All ranks agree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model_state_dict
from transformers import TrainerCallback

from lora_jobs.checkpoints import ADAPTER_WEIGHTS, DUMMY_STEPS, digest_tensors, load_manifest, read_header
from lora_jobs.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from lora_jobs.checkpoints import AdapterDigest
    from lora_jobs.training.agreement import Agreement

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


class Probe(TrainerCallback):  # type: ignore[misc] # transformers has no types
    """Compares model, optimizer and scheduler with the manifest of the checkpoint that they were loaded from."""

    def __init__(self, trainer: Trainer, checkpoint: Path, agreement: Agreement) -> None:
        self.trainer = trainer
        self.checkpoint = checkpoint
        self.agreement = agreement

    def on_train_begin(self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """CheckpointError in every rank when any of them holds something else. The checkpoint itself stays."""
        problem = find_difference(self.trainer, self.checkpoint, state.global_step)
        told = [(rank, text) for rank, text in enumerate(self.agreement.gather(problem)) if text is not None]
        if told:
            rank, text = told[0]
            name = self.checkpoint.name
            raise CheckpointError(
                f"{name} is good, but what was loaded from it is not what it holds: rank {rank}: {text}",
                path=self.checkpoint,
                hint="compare the versions in its MANIFEST.json with those of now: a library may read it differently",
            )


def find_difference(trainer: Trainer, checkpoint: Path, step: int) -> str | None:
    """What this rank holds that the checkpoint does not, in words; None where all is as committed.

    Under ZeRO-3 each rank has pieces of the weights only: there the counters are compared, and the weights are not.
    """
    manifest = load_manifest(checkpoint)
    if step != manifest.step:
        return f"the trainer is at step {step}, wanted {manifest.step}"
    engine = trainer.deepspeed if trainer.is_deepspeed_enabled else None
    if engine is not None and engine.global_steps != step:
        return f"DeepSpeed is at step {engine.global_steps}, wanted {step}"
    skipped = 0 if engine is None else engine.skipped_steps
    taken = None if trainer.args.fp16 else step - skipped
    optimizer = trainer.optimizer if engine is None else getattr(engine.optimizer, "optimizer", engine.optimizer)
    if taken is not None and engine is not None and engine.zero_optimization_stage() == 0:
        taken += DUMMY_STEPS if optimizer is not engine.optimizer else 0
    if taken is not None and (difference := compare_steps(optimizer, taken)) is not None:
        return difference
    if manifest.adapter is None or (engine is not None and engine.zero_optimization_stage() == 3):
        return None
    loaded = digest_loaded(trainer, checkpoint)
    return None if loaded == manifest.adapter else "the adapter in the model differs"


def compare_steps(optimizer: Any, wanted: int) -> str | None:
    """What is wrong with the counts of an optimizer that took `wanted` steps: another number, or an Adam without."""
    steps = find_optimizer_steps(optimizer)
    if wanted and not steps and any("betas" in group for group in optimizer.param_groups):
        return f"the optimizer holds no moments, wanted those of step {wanted}"
    return f"the optimizer is at step {min(steps)}, wanted {wanted}" if steps - {wanted} else None


def find_optimizer_steps(optimizer: Any) -> set[int]:
    """The counts of all parameters that an Adam-like optimizer holds; empty for one that does not count."""
    return {int(state["step"]) for state in optimizer.state.values() if isinstance(state, dict) and "step" in state}


def digest_loaded(trainer: Trainer, checkpoint: Path) -> AdapterDigest:
    """The digest of the model's tensors whose keys are in the checkpoint's adapter file."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    tensors = get_peft_model_state_dict(model)
    keys, _ = read_header(checkpoint / ADAPTER_WEIGHTS)

    def read() -> Iterator[tuple[str, str, list[int], memoryview]]:
        for key in sorted(keys.keys() & tensors.keys()):
            tensor = tensors[key].detach().cpu().contiguous()
            data = tensor.view(torch.uint8).numpy() if tensor.dim() else tensor[None].view(torch.uint8).numpy()
            yield key, _DTYPES.get(tensor.dtype, str(tensor.dtype)), list(tensor.shape), memoryview(data)

    return digest_tensors(read())
