"""A run whose ranks are small shell scripts: the launcher, the signals and the process list are the real ones."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import pytest

from lora_jobs.cluster.local import cancel_local, find_local_processes
from lora_jobs.rendering import Plan, build_plan
from lora_jobs.runs import Run, create_run
from lora_jobs.spec import load_environment, parse_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SPEC = """
name: shell
model: {name_or_path: /nowhere}
lora: {r: 4}
data: {train: /nowhere/train.jsonl}
training: {max_steps: 1}
resources: {cluster: local, nodes: NODES, gpus_per_node: 2, cpus_per_task: 3, time: "00:10:00"}
"""
WAITING = "exec 9<> <(:); while :; do read -t 0.05 -u 9; done"


@dataclass
class ShellRun:
    """A run and its plan; each rank writes the signals it gets to rank-N.txt in the run's logs."""

    run: Run
    plan: Plan

    def read(self, rank: int) -> list[str]:
        path = self.run.logs / f"rank-{rank}.txt"
        return path.read_text().split() if path.exists() else []

    def wait_for(self, ready: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < deadline, [self.read(0), self.read(1), find_local_processes(self.run)]
            time.sleep(0.02)


@pytest.fixture
def make_shell_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ShellRun]]:
    """Makes such a run. `body` is what a rank does after it has set its traps, `$rank` its number.

    Without one it waits, and starts no process to do so: a shell that forks is for a moment two of its command line.
    """
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # a launcher that is killed can't clean up after itself
    made: list[ShellRun] = []

    def make(body: str = WAITING, *, backend: str = "local", nodes: int = 1) -> ShellRun:
        python = tmp_path / "python of a 'job'"
        python.write_text(
            "#!/bin/bash\n"
            "rank=$SUBMITIT_LOCAL_GLOBALID; log=$LORA_JOBS_RUN/logs/rank-$rank.txt\n"
            "trap 'echo TERM >> \"$log\"; exit 85' TERM\ntrap 'echo USR2 >> \"$log\"; exit 85' USR2\n"
            f'echo started >> "$log"\n{body}\n'
        )
        python.chmod(0o755)
        spec = parse_spec(SPEC.replace("NODES", str(nodes)), source="shell.yaml")
        run_id = f"shell-{len(made) + 1}"
        directory = tmp_path / "runs of x" / run_id
        plan = build_plan(
            spec, load_environment("local"), backend=backend, run_id=run_id, run_directory=directory,
            python=str(python), estimate={}, versions={},
        )  # fmt: skip
        made.append(ShellRun(create_run(directory.parent, run_id, plan.files), plan))
        return made[-1]

    yield make
    for shell in made:
        cancel_local(shell.run, force=True)
        for child in psutil.Process().children():
            if child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, 0)
