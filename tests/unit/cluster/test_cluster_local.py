"""Local runs: started detached, found by their command line, told to stop, ended with each other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import psutil
import pytest

from lora_jobs.cluster.launch import RankController
from lora_jobs.cluster.local import (
    cancel_local,
    detect_device,
    find_local_processes,
    is_running,
    parse_nvidia_smi,
)
from lora_jobs.cluster.submission import choose_devices, submit_local
from lora_jobs.errors import ClusterError, SubmissionError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


MakeRun = "Callable[..., ShellRun]"


def test_local_run_from_start_to_saved_stop(make_shell_run: MakeRun):
    shell = make_shell_run()
    assert not is_running(shell.run)
    submission = submit_local(shell.plan, shell.run)
    shell.wait_for(lambda: shell.read(0) == shell.read(1) == ["started"])
    launcher, *ranks = find_local_processes(shell.run)
    assert (submission.backend, submission.job_id, len(ranks)) == ("local", str(launcher), 2)
    assert submission.pid_created_at == psutil.Process(launcher).create_time()
    assert (shell.run.submitit / f"{launcher}_submitted.pkl").exists(), "submitit's own record"
    assert sorted(cancel_local(shell.run)) == sorted(ranks)
    shell.wait_for(lambda: not is_running(shell.run))
    assert [shell.read(0), shell.read(1)] == [["started", "TERM"]] * 2


def test_signal_to_the_launcher_reaches_every_rank(make_shell_run: MakeRun):
    shell = make_shell_run()
    job_id = submit_local(shell.plan, shell.run).job_id
    shell.wait_for(lambda: shell.read(0) == shell.read(1) == ["started"])
    os.kill(int(job_id), signal.SIGUSR2)
    shell.wait_for(lambda: not is_running(shell.run))
    assert [shell.read(0), shell.read(1)] == [["started", "USR2"]] * 2


def test_ranks_see_the_environment_of_the_job(make_shell_run: MakeRun, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("WORLD_SIZE", "9")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    names = "OMP_NUM_THREADS SUBMITIT_EXECUTOR CUDA_VISIBLE_DEVICES SLURM_JOB_ID WORLD_SIZE"
    shell = make_shell_run(f'for n in {names}; do echo "$n=${{!n-unset}}" >> "$log"; done')
    submit_local(shell.plan, shell.run)
    shell.wait_for(lambda: len(shell.read(1)) == 6)
    assert shell.read(1)[1:] == [
        "OMP_NUM_THREADS=3",
        "SUBMITIT_EXECUTOR=local",
        "CUDA_VISIBLE_DEVICES=3,5",
        "SLURM_JOB_ID=unset",
        "WORLD_SIZE=unset",
    ]


def test_job_survives_ctrl_c_and_the_end_of_the_program_that_started_it(make_shell_run: MakeRun, tmp_path: Path):
    shell = make_shell_run()
    script = tmp_path / "submitter.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from lora_jobs.cluster.submission import submit_local\n"
        "from lora_jobs.rendering import build_plan\n"
        "from lora_jobs.runs import Run\n"
        "from lora_jobs.spec import load_environment, load_spec\n"
        "run = Run(Path(sys.argv[1]))\n"
        "plan = build_plan(load_spec(run.spec_path), load_environment('local'), backend='local', run_id=run.id,\n"
        "                  run_directory=run.directory, python=sys.argv[2], estimate={}, versions={})\n"
        "submit_local(plan, run)\n"
        "time.sleep(60)\n"
    )
    submitter = subprocess.Popen(
        [sys.executable, script, shell.run.directory, shell.plan.python],
        start_new_session=True, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    shell.wait_for(lambda: shell.read(0) == shell.read(1) == ["started"])
    os.killpg(submitter.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
    submitter.wait(60)
    time.sleep(0.3)
    assert len(find_local_processes(shell.run)) == 3
    assert [shell.read(0), shell.read(1)] == [["started"]] * 2


def test_processes_of_another_run_are_left_alone(make_shell_run: MakeRun):
    first, second = make_shell_run(), make_shell_run()
    for shell in (first, second):
        submit_local(shell.plan, shell.run)
        shell.wait_for(lambda shell=shell: shell.read(0) == shell.read(1) == ["started"])
    assert len(cancel_local(first.run, force=True)) == 3
    first.wait_for(lambda: not is_running(first.run))
    assert len(find_local_processes(second.run)) == 3
    assert second.read(0) == ["started"]


def test_two_nodes_are_refused_here(make_shell_run: MakeRun):
    shell = make_shell_run(nodes=2)
    with pytest.raises(SubmissionError, match=r"resources\.nodes is 2, this machine is one"):
        submit_local(shell.plan, shell.run)
    assert not shell.run.submitit.exists()


def test_unwritable_directory_is_said(make_shell_run: MakeRun):
    shell = make_shell_run()
    shell.run.submitit.write_text("a file in the way")
    with pytest.raises(SubmissionError, match="can't be written"):
        submit_local(shell.plan, shell.run)


class QuickController(RankController):
    failed_rank_seconds = 0.5


@pytest.fixture
def keep_signal_handlers() -> Iterator[None]:
    numbers = (signal.SIGTERM, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("keep_signal_handlers")
@pytest.mark.parametrize(
    ("limit", "delay", "body", "wanted", "least"),
    [
        # A warning before the time limit, then the end for ranks that don't listen.
        ("2", "1", "trap 'echo warned >> $log' USR2; while :; do sleep 0.05; done", ["started", "warned"], 1.9),
        # Rank 1 fails: rank 0, which would wait for ever, is ended too.
        ("60", "1", "[ $rank = 0 ] || exit 3; while :; do sleep 0.05; done", ["started"], 0.5),
        # Rank 1 ends well long before rank 0: rank 0 finishes its work.
        ("60", "1", "[ $rank = 1 ] && exit 0; sleep 1; echo finished >> $log", ["started", "finished"], 1.0),
    ],
)
def test_ranks_end_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, delay: str, body: str, wanted: list[str], least: float
):
    script = tmp_path / "rank.sh"
    log = f"{tmp_path}/rank-$SUBMITIT_LOCAL_GLOBALID.txt"
    script.write_text(f"rank=$SUBMITIT_LOCAL_GLOBALID; log={log}; trap 'exit 1' INT; echo started >> $log\n{body}\n")
    for name, value in {
        "NTASKS": "2", "COMMAND": f"/bin/bash {script}", "TIMEOUT_S": limit, "SIGNAL_DELAY_S": delay, "WITH_SHELL": "",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"SUBMITIT_LOCAL_{name}", value)
    monkeypatch.setenv("SUBMITIT_STDERR_TO_STDOUT", "")
    started = time.monotonic()
    QuickController(tmp_path / "submitit").run()
    assert least <= time.monotonic() - started < least + 20
    assert (tmp_path / "rank-0.txt").read_text().split() == wanted


@pytest.mark.parametrize(
    ("visible", "count", "wanted"), [(None, 2, "0,1"), ("3,5,7", 2, "3,5"), ("3", 2, "3"), ("", 1, "")]
)
def test_devices(visible: str | None, count: int, wanted: str):
    assert choose_devices(visible, count) == wanted


def test_nvidia_smi():
    assert parse_nvidia_smi("NVIDIA A100-SXM-64GB, 65536\nNVIDIA T4, 1\n") == ("NVIDIA A100-SXM-64GB", 65536 * 2**20)
    with pytest.raises(ClusterError, match="nvidia-smi answered 'No devices were found'"):
        parse_nvidia_smi("No devices were found\n")


def test_device_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cpu = ("cpu", psutil.virtual_memory().total)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert detect_device() == cpu
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA L4, 23034'\n")
    program.chmod(0o755)
    assert detect_device() == ("NVIDIA L4", 23034 * 2**20)
    assert detect_device("cpu") == cpu
    program.write_text('#!/bin/sh\necho "couldn\'t communicate with the NVIDIA driver"\nexit 9\n')
    assert detect_device() == cpu
