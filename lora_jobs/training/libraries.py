"""What torch, datasets, DeepSpeed and TRL are told before a run begins."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import datasets
import torch
from trl.trainer import utils

if TYPE_CHECKING:
    from lora_jobs.spec import JobSpec


def prepare_libraries(spec: JobSpec) -> None:
    """Threads and progress bars; on a CPU, TRL without the prompts' scores and DeepSpeed without its own compiling."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    datasets.disable_progress_bars()
    if torch.cuda.is_available():
        return
    score_completions_only()
    if spec.deepspeed is not None:
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled for minutes


def score_completions_only() -> None:
    """On a CPU, too, TRL's fused head scores only the tokens whose label counts, as it does on CUDA.

    Elsewhere it scores the prompt as well, for devices that compile a kernel for every new shape. Source: trl 1.16
    trainer/utils.py, add_fused_lm_head; the loss and its gradients are the same.
    """
    utils._use_triton = lambda _: True
