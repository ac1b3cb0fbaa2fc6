"""A crash after every operation of a real save, and within every write: the last committed checkpoint is chosen."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest
from fault_ranks import KINDS, fault, start_ours, wait_or_end
from save_recording import CALLS, RECORDING, Operation, Replay, load_recording, parse_strace
from tiny_runs import RankServer, create_tiny_run, read_logs

from lora_jobs.checkpoints import choose_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fault_ranks import Stopped

    from lora_jobs.runs import Run

pytestmark = pytest.mark.train

LONG = os.environ.get("LORA_JOBS_FAULTS") == "long"
SHARES = (0.0, 0.5, 1.0)
LOSSES = 3
_PUBLISHED = re.compile(r"checkpoint-(\d+)/MANIFEST\.json")


def save_twice(server: RankServer, run: Run, log: Path | None) -> None:
    """Train to step 7 with saves at 2, 4 and 6; from step 3 on strace writes to `log`."""
    ranks = KINDS["zero2"][1]
    faults = [*([fault("on_step_end", 3, "SIGSTOP")] if log else []), fault("on_step_end", 7)]
    job = start_ours(server, run, ranks, dict.fromkeys(range(ranks), faults))
    if log is not None:
        for pid in job.pids:
            os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT) if False else wait_until_stopped(pid)
        words = [word for pid in job.pids for word in ("-p", f"{pid}")]
        command = ["strace", "-f", "-y", "-s", "4096", "-e", f"trace={CALLS}", "-o", str(log), *words]
        tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert tracer.stderr is not None
        for _ in job.pids:
            assert "attached" in tracer.stderr.readline()
        job.kill(signal.SIGCONT)
    codes, _ = wait_or_end(job)
    if log is not None:
        tracer.wait(timeout=30)
        tracer.stderr.close()
    assert codes == [-9] * ranks, read_logs(run)
