"""The spec's training section as transformers' TrainingArguments (TRL's SFTConfig is one of them)."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments
from trl import SFTConfig

from lora_jobs.errors import RunError
from lora_jobs.training.reports import choose_trackers

if TYPE_CHECKING:
    from lora_jobs.runs import Run
    from lora_jobs.spec import JobSpec

SAME_NAMES = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "eval_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "bf16",
    "fp16",
    "activation_checkpointing",
    "logging_steps",
    "save_steps",
    "eval_steps",
    "load_best_model_at_end",
    "dataloader_num_workers",
    "torch_empty_cache_steps",
    "torch_compile",
    "use_liger_kernel",
    "seed",
)


def build_arguments(spec: JobSpec, run: Run, *, load_universal: bool = False) -> TrainingArguments:
    """TrainingArguments of a run. Building them opens the process group, so every rank must get here.

    `load_universal` is for the one start from a checkpoint that was converted to another number of processes.

    Errors: RunError for fp16 without a GPU (it would be ignored without a word).
    """
    cuda = torch.cuda.is_available()
    if spec.training.fp16 and not cuda:
        raise RunError("training.fp16 needs a GPU and this machine shows none", hint="use bf16 or neither")
    options = {**map_options(spec), **fixed_options(run, cuda=cuda)}
    options["dataloader_pin_memory"] = spec.training.dataloader_pin_memory and cuda
    if spec.deepspeed is not None:
        options["deepspeed"] = json.loads(run.deepspeed_path.read_text(encoding="utf-8"))
        if load_universal:
            options["deepspeed"]["checkpoint"] = {"load_universal": True}
        if spec.deepspeed.torch_autocast:
            # DeepSpeed's own autocast, by its JSON. With bf16 here it would cast every weight instead.
            options["bf16"] = False
    arguments = _build(spec, options)
    set_tf32(spec.training.tf32)
    return arguments


def _build(spec: JobSpec, options: dict[str, Any]) -> TrainingArguments:
    if spec.training.trainer == "transformers":
        return TrainingArguments(**options)
    return SFTConfig(
        **options,
        max_length=spec.data.max_length,
        packing=spec.data.packing,
        eval_packing=False,
        pad_to_multiple_of=spec.data.pad_to_multiple_of,
        dataset_kwargs={"skip_prepare_dataset": not spec.data.packing},
    )


def set_tf32(enabled: bool) -> None:
    """Multiply float32 matrices in TF32, or in float32 proper, on GPUs that know TF32; the others ignore it.

    By torch's older switches. TrainingArguments' tf32 takes the newer one, after which the older ones raise when they
    are read, as torch.compile does; set last, they make both readable and agree.
    """
    torch.set_float32_matmul_precision("high" if enabled else "highest")
    torch.backends.cudnn.allow_tf32 = enabled


def map_options(spec: JobSpec) -> dict[str, Any]:
    """What the spec decides, by TrainingArguments' names."""
    training = spec.training
    options = {name: getattr(training, name) for name in SAME_NAMES}
    options["max_steps"] = training.max_steps or -1
    options["num_train_epochs"] = training.num_train_epochs or 1.0
    # One field for both: below 1 it is a share of all steps.
    options["warmup_steps"] = training.warmup_steps or min(training.warmup_ratio, 0.999999)
    options["lr_scheduler_kwargs"] = dict(training.lr_scheduler_kwargs) or None
    options["report_to"] = choose_trackers(training) or "none"
    options["eval_strategy"] = "no" if training.eval_steps is None else "steps"
    if training.load_best_model_at_end or training.early_stopping_patience:
        options["metric_for_best_model"] = "loss"
        options["greater_is_better"] = False
    return options


def fixed_options(run: Run, *, cuda: bool) -> dict[str, Any]:
    """What is ours to decide: where things go, who logs, who rotates, and what makes a resume exact."""
    return {
        "output_dir": str(run.checkpoints),
        # For trackio, which has no variables of its own for them.
        "run_name": os.environ.get("WANDB_NAME") or run.id,
        "project": os.environ.get("WANDB_PROJECT") or "lora-jobs",
        "use_cpu": not cuda,
        "ddp_backend": "gloo" if "RANK" in os.environ and not cuda else None,
        "ddp_find_unused_parameters": False,
        "save_strategy": "steps",
        "save_total_limit": None,
        "restore_callback_states_from_checkpoint": True,
        "logging_strategy": "steps",
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "non_padding",
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "disable_tqdm": True,
        "log_level": "error",
        "label_names": ["labels"],
        "remove_unused_columns": True,
    }
