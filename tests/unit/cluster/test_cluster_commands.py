"""The door to other programs: real executables on PATH that answer, fail, hang or are not there."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import psutil
import pytest

from lora_jobs.cluster.commands import CompletedCommand, clean_environment, find_command, run_command, start_detached
from lora_jobs.errors import CommandError

if TYPE_CHECKING:
    from pathlib import Path


def write_program(directory: Path, name: str, body: str) -> Path:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_answer_is_returned_whatever_the_status(tmp_path: Path):
    program = write_program(tmp_path, "answers", 'cat; echo "arg: $1"; echo problem >&2; exit 3')
    answer = run_command([str(program), "a b; echo no"], timeout=10, input="in\n")
    assert answer == CompletedCommand((str(program), "a b; echo no"), "in\narg: a b; echo no\n", "problem\n", 3)


def test_bytes_that_are_no_text_do_not_break_it(tmp_path: Path):
    program = write_program(tmp_path, "binary", r"printf '\377\376ok'")
    assert run_command([str(program)], timeout=10).stdout == "\ufffd\ufffdok"


def test_not_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_command("sbatch") is None
    with pytest.raises(CommandError, match="sbatch is not on PATH"):
        run_command(["sbatch", "x"], timeout=10)


def test_not_executable(tmp_path: Path):
    path = tmp_path / "sbatch"
    path.write_text("#!/bin/sh\n")
    with pytest.raises(CommandError, match="can't be started: Permission denied"):
        run_command([str(path)], timeout=10)


def test_hanging_program_is_killed_with_its_children(tmp_path: Path):
    program = write_program(tmp_path, "hangs", f"sleep 61 & echo $! > {tmp_path}/child; wait")
    started = time.monotonic()
    with pytest.raises(CommandError, match="did not answer within 0 s"):
        run_command([str(program)], timeout=0.4)
    assert time.monotonic() - started < 30
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 60
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.02)


def test_clean_environment_drops_what_a_job_left():
    given = {
        "HOME": "/h", "PATH": "/bin", "SLURM_CONF": "/c", "SLURM_JOB_ID": "1", "SBATCH_PARTITION": "p",
        "SRUN_DEBUG": "3", "SQUEUE_FORMAT": "%i", "SACCT_FORMAT": "x", "SCANCEL_INTERACTIVE": "1", "RANK": "0",
        "WORLD_SIZE": "2", "MASTER_ADDR": "a", "SUBMITIT_EXECUTOR": "slurm", "RANKING": "kept",
        "CUDA_VISIBLE_DEVICES": "1",
    }  # fmt: skip
    assert clean_environment(given) == {
        "HOME": "/h",
        "PATH": "/bin",
        "SLURM_CONF": "/c",
        "RANKING": "kept",
        "CUDA_VISIBLE_DEVICES": "1",
    }


def test_detached_program_has_its_own_session_and_log(tmp_path: Path):
    program = write_program(tmp_path, "lives", "echo out; echo err >&2; sleep 60")
    pid = start_detached([str(program)], env=dict(os.environ), log=tmp_path / "log")
    try:
        deadline = time.monotonic() + 60
        while (tmp_path / "log").read_text().count("\n") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert os.getsid(pid) == pid != os.getsid(0)
        assert (tmp_path / "log").read_text() == "out\nerr\n"
    finally:
        os.killpg(pid, 9)
        os.waitpid(pid, 0)
