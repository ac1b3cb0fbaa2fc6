"""What torch, datasets, DeepSpeed and TRL are told before a run begins."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import datasets
import torch
from trl.trainer import utils

from lora_jobs.sizing.losses import CPU_TILE_COLUMNS

if TYPE_CHECKING:
    from lora_jobs.spec import JobSpec


def prepare_libraries(spec: JobSpec) -> None:
    """Threads and progress bars; on a CPU, TRL's head in its measure and DeepSpeed without its own compiling."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    datasets.disable_progress_bars()
    if torch.cuda.is_available():
        return
    fit_head_to_cpu()
    if spec.deepspeed is not None:
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled for minutes


def fit_head_to_cpu() -> None:
    """TRL's fused head on a CPU: only the tokens whose label counts are scored, as on CUDA, in tiles that stay in its
    caches. The loss and its gradients are the same.

    Off CUDA TRL scores the prompt as well, for devices that compile a kernel for every new shape, and its tiles are
    made for a GPU. Source: trl 1.16 trainer/utils.py, add_fused_lm_head.
    """
    utils._use_triton = lambda _: True
    utils._CHUNKED_LOGPROB_CHUNK_SIZE = CPU_TILE_COLUMNS
