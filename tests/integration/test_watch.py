"""`status --watch` on a terminal: redrawn in place, one round of questions per ten seconds, Ctrl-C ends it."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from terminals import read_until_closed

from lora_jobs.runs import Submission, append_submission, create_run

RECORDED = Path(__file__).parents[1] / "slurm_output" / "22.05"


def make_programs(directory: Path) -> None:
    """Fakes that answer what was recorded and write down when they were asked."""
    directory.mkdir()
    for name, answer in (("squeue", "queue"), ("sprio", "sprio"), ("scontrol", "scontrol_config")):
        program = directory / name
        text = f"#!/bin/sh\necho {name} >> {directory}/calls\ncat {RECORDED / answer}.txt\n"
        program.write_text(text)
        program.chmod(0o755)


def test_watch_on_a_terminal(tmp_path: Path) -> None:
    make_programs(tmp_path / "bin")
    run = create_run(tmp_path / "runs", "a-1", {"spec.yaml": "name: a\n"})
    append_submission(run, Submission("3", "slurm", 1.0, "here"))
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:/usr/bin:/bin", "LORA_JOBS_HOME": str(tmp_path / "runs"),
                   "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}  # fmt: skip
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "lora_jobs", "status", "--watch"]
    process = subprocess.Popen(command, stdin=end, stdout=end, stderr=end, env=environment, cwd=tmp_path)
    os.close(end)
    shown, deadline = b"", time.monotonic() + 60
    while shown.count(b"Ctrl-C ends") < 2 and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.5)[0]:
            shown += os.read(terminal, 65536)
    process.send_signal(signal.SIGINT)
    shown += read_until_closed(terminal)
    assert process.wait(30) == 130
    text = shown.decode()
    first, second = text.split("\x1b[H")[-2:]
    assert "2 of 9 pending" in first
    assert "2 of 9 pending" in second
    assert text.count("\x1b[2J") == 0, "nothing is ever cleared as a whole"
    assert "a-1" in text.rpartition("\x1b[?1049l")[2], "the last table stays on the screen"
    assert (tmp_path / "bin/calls").read_text().split() == ["squeue", "scontrol"] * 2
