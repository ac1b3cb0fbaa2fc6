"""What a commit and a verification cost beside the bare save: files of the size of a real LoRA checkpoint.

Two ranks save as Trainer and DeepSpeed do, by turns without a commit and with one: the training's own commit, with the
rotation after it, which verifies the checkpoint before byte for byte. The commit is timed from the last rank's last
file to the moment when all ranks may train on; whole saves of both kinds stand beside it.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from lora_jobs.checkpoints import commit_checkpoint, rotate_checkpoints, verify_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

STEP = 100
INTERVAL_SECONDS = 300.0
# Gemma 2 2B, r = 16 on all seven projections: 20.8 M trained parameters over two ranks; bf16 adapter, fp32 master and
# two moments (12 bytes a parameter).
PARAMETERS = 20_800_000
REPEATS = 3
RANKS = 2
ROUNDS = 5


def measure_costs() -> dict[str, Any]:
    """Seconds of a bare save, of a save with a commit, of its commit alone, of each verify level, and the disk's read
    speed; medians.
    """
    bare, committed, commits = measure_saves()
    samples = [measure_once() for _ in range(REPEATS)]
    middle = {key: sorted(sample[key] for sample in samples)[REPEATS // 2] for key in samples[0]}
    size = middle["bytes"]
    middle |= {"save_seconds": median(bare), "save_and_commit_seconds": median(committed)}
    middle["commit_seconds"] = median(commits)
    return {
        **{key: round(value, 4) for key, value in middle.items()},
        "commit_percent_of_5_minutes": round(100 * middle["commit_seconds"] / INTERVAL_SECONDS, 3),
        "verify_gb_per_second": round(size / middle["verify_2_seconds"] / 1e9, 3),
        "read_gb_per_second": round(size / middle["read_seconds"] / 1e9, 3),
    }


def measure_saves() -> tuple[list[float], list[float], list[float]]:
    """Seconds of each save of two ranks, without a commit and with one, by turns; and of each commit alone."""
    with socket.socket() as probe, tempfile.TemporaryDirectory(prefix="lora-jobs-costs-") as directory:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        context = get_context("spawn")
        mine, theirs = context.Pipe(duplex=False)
        probe.close()
        ranks = [context.Process(target=save_by_turns, args=(rank, port, directory, theirs)) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        found: tuple[list[float], list[float], list[float]] = mine.recv()
        for process in ranks:
            process.join()
    return found


def save_by_turns(rank: int, port: int, directory: str, answer: Connection) -> None:
    """One rank: the same save again and again, every second one committed; rank 0 sends the seconds."""
    os.environ.update(RANK=f"{rank}", WORLD_SIZE=f"{RANKS}", MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
    import torch
    import torch.distributed as dist

    from lora_jobs.training.agreement import Agreement
    from lora_jobs.training.saving import SaveErrors, commit_together

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    agreement, errors = Agreement(RANKS), SaveErrors()
    seconds: tuple[list[float], list[float], list[float]] = ([], [], [])
    for turn in range(2 * ROUNDS):
        checkpoint = Path(directory) / f"checkpoint-{turn + 1}"
        os.sync()  # what the turn before has left to the kernel is not this one's
        agreement.wait()
        began = time.monotonic()
        write_part(checkpoint, rank, step=turn + 1)
        agreement.wait()  # as DeepSpeed's own barrier after its files
        written = time.monotonic()
        if committing := turn % 2:
            common = {"step": turn + 1, "rank": rank, "world_size": RANKS, "metadata": {}}
            failure = commit_together(checkpoint, agreement, errors, **common)
            assert failure is None, failure
            if rank == 0:
                rotate_checkpoints(checkpoint.parent, committed=checkpoint)
        agreement.wait()
        seconds[committing].append(time.monotonic() - began)
        if committing:
            seconds[2].append(time.monotonic() - written)
        if rank == 0 and not committing:
            shutil.rmtree(checkpoint)
    dist.destroy_process_group()
    if rank == 0:
        answer.send(seconds)


def measure_once() -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="lora-jobs-costs-") as name:
        directory = Path(name) / f"checkpoint-{STEP}"
        for rank in range(RANKS):
            write_part(directory, rank, step=STEP)
        commit_checkpoint(directory, step=STEP, world_size=RANKS)
        levels = {}
        for level in (0, 1, 2):
            forget(directory)
            levels[f"verify_{level}_seconds"] = clock(lambda level=level: verify(directory, level))
        forget(directory)
        read = clock(lambda: read_all(directory))
        size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return {"bytes": size, "read_seconds": read, **levels}


def clock(action: Callable[[], Any]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


def verify(directory: Path, level: int) -> None:
    verdict = verify_checkpoint(directory, level=level)
    assert verdict.good, verdict.reason


def write_part(directory: Path, rank: int, *, step: int) -> None:
    """One rank's files of a ZeRO-2 checkpoint, written as Trainer and DeepSpeed write them: without fsync."""
    import torch
    from safetensors.torch import save_file

    states = directory / f"global_step{step}"
    states.mkdir(parents=True, exist_ok=True)
    shard = {name: torch.rand(PARAMETERS // RANKS) for name in ("master", "exp_avg", "exp_avg_sq")}
    torch.save(shard, states / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    torch.save({"cpu": torch.get_rng_state()}, directory / f"rng_state_{rank}.pth")
    if rank > 0:
        return
    save_file({"base.lora_A.weight": torch.rand(PARAMETERS).bfloat16()}, directory / "adapter_model.safetensors")
    torch.save({"module": {}}, states / "mp_rank_00_model_states.pt")
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
