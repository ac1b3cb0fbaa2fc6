from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import psutil
import pytest

from lora_jobs.errors import RunError
from lora_jobs.runs import Run
from lora_jobs.training.launch import Launch, export_launch, read_launch

if TYPE_CHECKING:
    from pathlib import Path

HOST = socket.gethostname()


def test_a_slurm_task_is_read_from_its_variables() -> None:
    environment = {
        "SLURM_JOB_ID": "4711",
        "SLURM_RESTART_COUNT": "2",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS": "8",
    }
    assert read_launch(environment) == Launch("slurm", "4711", 2, 5, 1, 8, HOST)


def test_an_array_task_goes_by_array_and_index_and_the_batch_shell_by_rank_0() -> None:
    environment = {"SLURM_JOB_ID": "4713", "SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "2"}
    assert read_launch(environment) == Launch("slurm", "4711_2", 0, 0, 0, 1, HOST)


def test_a_local_rank_is_known_by_its_launcher_and_when_that_was_created() -> None:
    environment = {
        "SUBMITIT_LOCAL_JOB_ID": str(os.getpid()),
        "SUBMITIT_LOCAL_GLOBALID": "1",
        "SUBMITIT_LOCAL_LOCALID": "1",
        "SUBMITIT_LOCAL_NTASKS": "2",
        "SLURM_JOB_ID": "4711",
    }
    created = psutil.Process().create_time()
    assert read_launch(environment) == Launch("local", str(os.getpid()), 0, 1, 1, 2, HOST, created)


def test_one_process_is_not_distributed_and_sees_one_gpu(tmp_path: Path) -> None:
    environment = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "CUDA_VISIBLE_DEVICES": "2,3"}
    launch = Launch("local", "1", 0, 0, 0, 1, HOST)
    export_launch(launch, Run(tmp_path), attempt=1, distributed=False, environment=environment)
    assert environment == {"CUDA_VISIBLE_DEVICES": "2"}


def test_local_ranks_meet_at_the_port_that_rank_0_names(tmp_path: Path) -> None:
    found = []
    for rank in (0, 1):
        environment: dict[str, str] = {}
        launch = Launch("local", "77", 0, rank, rank, 2, HOST)
        export_launch(launch, Run(tmp_path), attempt=3, distributed=True, environment=environment)
        found.append(environment)
    port = (tmp_path / "submitit" / "attempt-3_master_port").read_text().strip()
    assert found == [
        {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for rank in (0, 1)
    ]


def test_on_slurm_the_script_must_have_named_the_meeting_point(tmp_path: Path) -> None:
    launch = Launch("slurm", "77", 0, 0, 0, 2, HOST)
    with pytest.raises(RunError, match="MASTER_ADDR and MASTER_PORT are not set"):
        export_launch(launch, Run(tmp_path), attempt=1, distributed=True, environment={"MASTER_ADDR": "lrdn0001"})
