"""What a commit and a verification cost beside the bare save: files of the size of a real LoRA checkpoint.

The commit is measured with the rotation after it, which verifies the checkpoint before byte for byte.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_jobs.checkpoints import commit_checkpoint, rotate_checkpoints, verify_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

STEP = 100
INTERVAL_SECONDS = 300.0
# Gemma 2 2B, r = 16 on all seven projections: 20.8 M trained parameters over two ranks; bf16 adapter, fp32 master and
# two moments (12 bytes a parameter).
PARAMETERS = 20_800_000
REPEATS = 3


def measure_costs() -> dict[str, Any]:
    """Seconds of a bare save, of the commit after it, of each verify level, and the disk's read speed; medians of 3."""
    samples = [measure_once() for _ in range(REPEATS)]
    middle = {key: sorted(sample[key] for sample in samples)[REPEATS // 2] for key in samples[0]}
    size = middle["bytes"]
    return {
        **{key: round(value, 4) for key, value in middle.items()},
        "commit_percent_of_5_minutes": round(100 * middle["commit_seconds"] / INTERVAL_SECONDS, 3),
        "verify_gb_per_second": round(size / middle["verify_2_seconds"] / 1e9, 3),
        "read_gb_per_second": round(size / middle["read_seconds"] / 1e9, 3),
    }


def measure_once() -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="lora-jobs-costs-") as name:
        directory = Path(name) / f"checkpoint-{STEP}"
        save = clock(lambda: write_checkpoint(directory, step=STEP))
        before = directory.with_name(f"checkpoint-{STEP - 1}")
        write_checkpoint(before, step=STEP - 1)
        commit_checkpoint(before, step=STEP - 1, world_size=2)

        def commit_and_rotate() -> None:
            commit_checkpoint(directory, step=STEP, world_size=2)
            rotate_checkpoints(directory.parent, committed=directory)

        commit = clock(commit_and_rotate)
        levels = {}
        for level in (0, 1, 2):
            forget(directory)
            levels[f"verify_{level}_seconds"] = clock(lambda level=level: verify(directory, level))
        forget(directory)
        read = clock(lambda: read_all(directory))
        size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return {"bytes": size, "save_seconds": save, "commit_seconds": commit, "read_seconds": read, **levels}


def clock(action: Callable[[], Any]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


def verify(directory: Path, level: int) -> None:
    verdict = verify_checkpoint(directory, level=level)
    assert verdict.good, verdict.reason


def write_checkpoint(directory: Path, *, step: int) -> None:
    """The files of a ZeRO-2 checkpoint of two ranks, written as Trainer and DeepSpeed write them: without fsync."""
    import torch
    from safetensors.torch import save_file

    states = directory / f"global_step{step}"
    states.mkdir(parents=True)
    save_file({"base.lora_A.weight": torch.rand(PARAMETERS).bfloat16()}, directory / "adapter_model.safetensors")
    torch.save({"module": {}}, states / "mp_rank_00_model_states.pt")
    for rank in (0, 1):
        shard = {name: torch.rand(PARAMETERS // 2) for name in ("master", "exp_avg", "exp_avg_sq")}
        torch.save(shard, states / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        torch.save({"cpu": torch.get_rng_state()}, directory / f"rng_state_{rank}.pth")
    torch.save({"last_epoch": step}, directory / "scheduler.pt")
    (directory / "latest").write_text(f"global_step{step}")
    (directory / "adapter_config.json").write_text("{}")
    (directory / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": 1.0}))


def forget(directory: Path) -> None:
    """Drop the files from the page cache, so that the next read is the disk's."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def read_all(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(8 * 1024**2):
                    pass


if __name__ == "__main__":
    print(json.dumps(measure_costs(), indent=1))
