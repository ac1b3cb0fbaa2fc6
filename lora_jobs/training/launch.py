"""Where this process stands in its job: rank, size, job id. Read from the environment that Slurm or submitit gave."""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING

import psutil
from msgspec import Struct

from lora_jobs.errors import RunError
from lora_jobs.runs import write_atomic

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

    from lora_jobs.runs import Backend, Run

POLL_SECONDS = 0.1
RENDEZVOUS_SECONDS = 300.0


class Launch(Struct, frozen=True):
    """One process of one start of a job. A requeue keeps Slurm's job id and counts up `restart_count`.

    `started_after` (seconds since the epoch) tells a local job from an older one whose process id it got again.
    """

    backend: Backend
    job_id: str
    restart_count: int
    rank: int
    local_rank: int
    world_size: int
    host: str
    started_after: float = 0.0


def read_launch(environment: Mapping[str, str]) -> Launch:
    """Launch from SLURM_* or SUBMITIT_LOCAL_* variables; a single process where neither is set.

    In the batch script of a job (no SLURM_PROCID) the rank is 0. Names: srun(1), submitit's LocalJobEnvironment.
    """
    host = socket.gethostname()
    if "SUBMITIT_LOCAL_JOB_ID" in environment:
        return Launch(
            "local",
            environment["SUBMITIT_LOCAL_JOB_ID"],
            0,
            int(environment.get("SUBMITIT_LOCAL_GLOBALID", "0")),
            int(environment.get("SUBMITIT_LOCAL_LOCALID", "0")),
            int(environment.get("SUBMITIT_LOCAL_NTASKS", "1")),
            host,
            find_creation_time(environment["SUBMITIT_LOCAL_JOB_ID"]),
        )
    if "SLURM_JOB_ID" in environment:
        array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
        return Launch(
            "slurm",
            f"{array}_{task}" if array and task else environment["SLURM_JOB_ID"],
            int(environment.get("SLURM_RESTART_COUNT") or "0"),
            int(environment.get("SLURM_PROCID", "0")),
            int(environment.get("SLURM_LOCALID", "0")),
            int(environment.get("SLURM_NTASKS", "1")),
            environment.get("SLURMD_NODENAME") or host,
        )
    return Launch("local", f"{os.getpid()}", 0, 0, 0, 1, host, find_creation_time(f"{os.getpid()}"))


def find_creation_time(job_id: str) -> float:
    """When the process whose id is a local job's id was created; 0.0 where there is none."""
    try:
        return psutil.Process(int(job_id)).create_time()
    except (ValueError, psutil.Error):
        return 0.0


def export_launch(
    launch: Launch, run: Run, *, attempt: int, distributed: bool, environment: MutableMapping[str, str]
) -> None:
    """Set what torch.distributed reads (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).

    One process without DeepSpeed is not distributed: it gets none of them, and sees one GPU only, since Trainer would
    otherwise wrap the model in DataParallel.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not distributed:
        for name in names:
            environment.pop(name, None)
        environment["CUDA_VISIBLE_DEVICES"] = (environment.get("CUDA_VISIBLE_DEVICES") or "0").split(",")[0]
        return
    environment["RANK"] = str(launch.rank)
    environment["LOCAL_RANK"] = str(launch.local_rank)
    environment["WORLD_SIZE"] = str(launch.world_size)
    if launch.backend == "local":
        environment["MASTER_ADDR"] = "127.0.0.1"
        environment["MASTER_PORT"] = str(agree_on_port(launch, run, attempt))
    elif not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        raise RunError(
            "MASTER_ADDR and MASTER_PORT are not set: the processes cannot find each other",
            hint="start the job with the run's script.sbatch: it sets both",
        )


def agree_on_port(launch: Launch, run: Run, attempt: int) -> int:
    """A port that is free on this host: rank 0 picks and publishes it in the run's submitit folder, the others read.

    Errors: RunError when rank 0 publishes none within 300 s.
    """
    path = run.submitit / f"attempt-{attempt}_master_port"
    if launch.rank == 0:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, f"{port}\n")
        return port
    deadline = time.monotonic() + RENDEZVOUS_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise RunError(f"rank 0 named no port within {RENDEZVOUS_SECONDS:.0f} s in {path}")
        time.sleep(POLL_SECONDS)
    return int(path.read_text(encoding="ascii"))


def redirect_output(run: Run, attempt: int) -> None:
    """Send this process's stdout and stderr to logs/attempt-K.out and .err, appending. srun does it under Slurm."""
    run.logs.mkdir(parents=True, exist_ok=True)
    for descriptor, suffix in ((1, "out"), (2, "err")):
        target = os.open(run.logs / f"attempt-{attempt}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(target, descriptor)
        os.close(target)
