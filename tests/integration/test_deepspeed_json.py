"""deepspeed.json as the real Trainer and the real DeepSpeed read it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[1] / "golden"
# One process for all files: importing the stack takes most of the time.
READ = """
import json, sys
from types import SimpleNamespace
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig
from deepspeed.runtime.config import DeepSpeedConfig

found = {}
for path in sys.argv[1:]:
    config = HfTrainerDeepSpeedConfig(path)
    given = json.load(open(path))
    args = SimpleNamespace(
        world_size=1, per_device_train_batch_size=3, gradient_accumulation_steps=4, max_grad_norm=0.5,
        learning_rate=1e-4, adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8, weight_decay=0.01,
        save_on_each_node=False, fp16="fp16" in given, bf16="bf16" in given, fp16_full_eval=False,
        bf16_full_eval=False, get_warmup_steps=lambda steps: 0,
    )
    config.trainer_config_process(args)
    config.trainer_config_finalize(args, SimpleNamespace(config=SimpleNamespace(hidden_size=16)), 10)
    read = DeepSpeedConfig(config.config)
    zero = read.zero_config
    found[path.rpartition("/")[2]] = {
        "auto": '"auto"' in json.dumps(config.config), "stage": int(zero.stage), "reduce": zero.reduce_bucket_size,
        "allgather": zero.allgather_bucket_size, "micro": read.train_micro_batch_size_per_gpu,
        "accumulation": read.gradient_accumulation_steps, "clipping": read.gradient_clipping,
        "bf16": read.bfloat16_config.enabled, "fp16": read.float16_config.enabled,
        "offload": None if zero.offload_optimizer is None else str(zero.offload_optimizer.device),
        "autocast": str(read.torch_autocast_dtype) if read.torch_autocast_enabled else None,
        "optimizer": read.optimizer_name, "own_cpu_optimizer": read.zero_force_ds_cpu_optimizer,
    }
print("FOUND " + json.dumps(found))
"""


@pytest.mark.train
def test_trainer_and_deepspeed_read_what_the_spec_says() -> None:
    files = sorted(str(path) for path in GOLDEN.glob("deepspeed_*.json"))
    done = subprocess.run(
        [sys.executable, "-c", READ, *files],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    common = {
        "auto": False, "stage": 2, "reduce": 256, "allgather": 500_000_000, "micro": 3, "accumulation": 4,
        "clipping": 0.5, "bf16": False, "fp16": False, "offload": None, "autocast": None, "optimizer": None,
        "own_cpu_optimizer": True,
    }  # fmt: skip
    assert json.loads(line.removeprefix("FOUND ")) == {
        "deepspeed_zero2.json": common,
        "deepspeed_zero2_bf16_buckets.json": {**common, "reduce": 500_000_000, "bf16": True},
        "deepspeed_zero2_torch_autocast.json": {**common, "autocast": "torch.bfloat16"},
        "deepspeed_zero2_offload.json": {**common, "offload": "cpu", "own_cpu_optimizer": False},
        "deepspeed_zero3_fp16.json": {**common, "stage": 3, "fp16": True},
    }
