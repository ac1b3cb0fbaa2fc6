"""Why an attempt ended, from lines as torch, NCCL, Python and Slurm write them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from lora_jobs.runs import CAUSES, SLURM_STATES, classify_end, read_tail

if TYPE_CHECKING:
    from pathlib import Path

TRACEBACK = 'Traceback (most recent call last):\n  File "loop.py", line 68, in run_training\n    trainer.train()\n'
CUDA_OOM = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 7.81 GiB. GPU 0 has a total capacity of 63.43 GiB"
    " of which 3.15 GiB is free."
)
WATCHDOG = (
    "[rank1]:[E1120 18:03:11.123 ProcessGroupNCCL.cpp:632] [Rank 1] Watchdog caught collective operation timeout: "
    "WorkNCCL(SeqNum=912, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=600000) ran for 600029 milliseconds "
    "before timing out."
)
NCCL_ERROR = (
    "torch.distributed.DistBackendError: NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3690,"
    " unhandled system error, NCCL version 2.27.5"
)
GLOO = (
    "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:433"
)
STEP_ENDED = "slurmstepd: error: *** STEP 12.0 ON lrdn0001 CANCELLED AT 2026-11-20T18:03:11"


@pytest.mark.parametrize(
    ("log", "code", "state", "cause"),
    [
        ("", 0, None, "finished"),
        ("", 85, None, "saved"),
        ("", 86, None, "no_checkpoint"),
        ("", 87, None, "hang"),
        ("", 88, None, "no_progress"),
        (TRACEBACK + CUDA_OOM, 1, "FAILED", "gpu_memory"),
        (f"{TRACEBACK}{GLOO}\n{TRACEBACK}{CUDA_OOM}", 1, "FAILED", "gpu_memory"),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=12.0. Some of the step tasks have been OOM Killed.",
         137, "OUT_OF_MEMORY", "host_memory"),
        ("slurmstepd: error: Detected 1 oom-kill event(s) in StepId=12.batch cgroup.", 137, None, "host_memory"),
        ("", None, "OUT_OF_MEMORY", "host_memory"),
        (TRACEBACK + NCCL_ERROR, 1, "FAILED", "nccl"),
        (f"{GLOO}\n{WATCHDOG}", 134, "FAILED", "nccl"),
        (TRACEBACK + "RuntimeError: CUDA error: uncorrectable ECC error encountered", 1, None, "gpu_broken"),
        (TRACEBACK + "RuntimeError: No CUDA GPUs are available", 1, None, "gpu_broken"),
        ("lrdn0001 shows no GPU to torch, and the job was sized for A100-64", 5, None, "gpu_broken"),
        ("the loss is nan at step 12: nothing after it can be used", 5, None, "not_finite"),
        ("checkpoint-8 was committed by another job after this one had chosen checkpoint-4", 5, None, "stale_choice"),
        ("tiny-1 is being trained by job 7 on lrdn0001 (process 4711)", 5, None, "second_writer"),
        ("Timeout (0:10:00)!\nThread 0x00007f (most recent call first):", 1, None, "hang"),
        (f"{STEP_ENDED} DUE TO TIME LIMIT ***", 143, None, "time_limit"),
        ("", None, "TIMEOUT", "time_limit"),
        (f"{STEP_ENDED} DUE TO PREEMPTION ***", 143, None, "preempted"),
        ("", None, "PREEMPTED", "preempted"),
        (f"{STEP_ENDED} DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***", None, None, "node_failure"),
        ("", None, "NODE_FAIL", "node_failure"),
        (f"{STEP_ENDED} ***", 143, None, "cancelled"),
        ("", None, "CANCELLED by 1001", "cancelled"),
        ("", None, "CANCELLED+", "cancelled"),
        ("The server socket has failed to listen on any local network address. port: 29500, useIpv6: false, code: -98,"
         " name: EADDRINUSE, message: address already in use", 1, None, "port_taken"),
        (TRACEBACK + GLOO, 1, "FAILED", "lost_rank"),
        ("", 137, "FAILED", "killed"),
        ("", None, "KILLED", "killed"),
        (TRACEBACK + "KeyError: 'labels'", 1, "FAILED", "python_error"),
        ("", 1, "FAILED", "failed"),
        ("", None, None, "failed"),
        ("", None, "BRAND_NEW", "failed"),
        ("", None, "LAUNCH_FAILED", "not_started"),
    ],
)  # fmt: skip
def test_the_cause(log: str, code: int | None, state: str | None, cause: str) -> None:
    assert classify_end(log=log, exit_code=code, state=state).cause.name == cause


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr


@pytest.mark.parametrize(
    ("code", "cause", "evidence"),
    [
        ("open('/dev/full', 'w', buffering=1).write('x' * 9000)", "disk_full", os.strerror(errno.ENOSPC)),
        ("import a_package_that_is_not_there", "packages", "No module named 'a_package_that_is_not_there'"),
        ("bytearray(1 << 60)", "host_memory", "MemoryError"),
        ("{}['labels']", "python_error", "KeyError: 'labels'"),
        ("import faulthandler, time; faulthandler.dump_traceback_later(0.1, exit=True); time.sleep(9)", "hang", "Time"),
    ],
)
def test_what_python_really_writes(code: str, cause: str, evidence: str) -> None:
    found = classify_end(log=run_python(code), exit_code=1)
    assert (found.cause.name, evidence in str(found.evidence)) == (cause, True)


def test_every_ended_state_of_slurm_has_a_cause_of_its_own() -> None:
    plain = {"FAILED", "REVOKED"}
    ended = {state.name for state in SLURM_STATES if state.has_ended} - plain
    assert {name for name in ended if classify_end(state=name).cause.name == "failed"} == set()


def test_every_row_says_what_to_do() -> None:
    assert len({cause.name for cause in CAUSES}) == len(CAUSES)
    assert all(cause.meaning and cause.advice for cause in CAUSES)


def test_only_the_end_of_a_log_is_read(tmp_path: Path) -> None:
    log = tmp_path / "attempt-1.err"
    log.write_bytes(b"\xff" * 1000 + b"the end")
    assert read_tail([log, tmp_path / "absent"], most=10).endswith("the end")
    assert len(read_tail([log], most=10)) == 10
