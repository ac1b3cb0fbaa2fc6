"""What torch, datasets, DeepSpeed and TRL are told before a run begins."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import datasets
import torch

if TYPE_CHECKING:
    from lora_jobs.spec import JobSpec


def prepare_libraries(spec: JobSpec) -> None:
    """Threads and progress bars; on a CPU, TRL's head in its measure and DeepSpeed without its own compiling."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    datasets.disable_progress_bars()
    if torch.cuda.is_available():
        return
    from lora_jobs.training.cpu_head import fit_head_to_cpu

    fit_head_to_cpu()
    if spec.deepspeed is not None:
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled for minutes
