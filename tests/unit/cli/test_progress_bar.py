"""A run that is followed: a bar on a terminal, one plain line per log step in a file."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from terminals import read_until_closed

PROGRAM = """
from lora_jobs.cli.show_runs import show_progress
from lora_jobs.workflows.observing import RunStatus

def status(state):
    values = dict.fromkeys(RunStatus.__struct_fields__)
    return RunStatus(**{**values, "run": "a-1", "state": state, "total_steps": 2})

steps = [{"kind": "train", "step": n, "max_steps": 2, "loss": 3.0 / n, "tokens_per_second": 40.0} for n in (1, 2)]
evaluation = {"kind": "eval", "step": 2, "eval_loss": 1.75}
show_progress([status("RUNNING"), *steps, evaluation, status("COMPLETED")])
"""
PLAIN = """\
a-1: running
step 1/2  loss 3.0000  40 tokens/s
step 2/2  loss 1.5000  40 tokens/s
step 2/2  held-out loss 1.7500
a-1: completed
"""


def test_in_a_file_every_step_is_a_line() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", PLAIN)


@pytest.mark.skipif(not Path("/dev/ptmx").exists(), reason="no pseudo-terminals here")
def test_on_a_terminal_a_bar_moves_and_no_step_is_a_line() -> None:
    terminal, end = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "NO_COLOR": "1"}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=end, stdout=end, stderr=end, env=environment)
    os.close(end)
    text = read_until_closed(terminal).decode()
    assert process.wait(30) == 0
    assert "completed ━" in text
    assert "2/2 loss 1.5000" in text
    assert "step 2/2  loss" not in text
    assert "step 2/2  held-out loss 1.7500" in text
