"""A sweep on a machine without Slurm: its tasks one after another, ranked at the end; cancelled and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tiny_runs import TIMEOUT_SECONDS, hash_adapter, read_logs, wait_for_step

from lora_jobs.runs import Sweep, find_own_sweep, load_attempts, load_submissions, load_sweep

if TYPE_CHECKING:
    from lora_jobs.runs import Run

pytestmark = pytest.mark.train

SPEC = Path(__file__).resolve().parents[2] / "jobs/tiny_gemma2.yaml"
ENDLESS = 100_000


class Shell:
    """Commands in a directory with the tiny model and its data, with a runs root of the test's own."""

    def __init__(self, directory: Path, runs: Path) -> None:
        self.directory, self.runs = directory, runs

    def run(self, *words: str, code: int = 0) -> str:
        environment = {**os.environ, "LORA_JOBS_HOME": str(self.runs), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "lora_jobs", *words], cwd=self.directory, env=environment, capture_output=True,
            text=True, check=False, timeout=600,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, *words: str) -> str:
        sets = ("resources.gpus_per_node=1", "training.save_steps=5", "data.eval=data/tiny/prompt.jsonl")
        extra = [word for each in sets for word in ("--set", each)]
        return self.run("submit", str(SPEC), "--cluster", "local", *extra, *words)

    def ask(self, *words: str) -> dict[str, Any]:
        return dict(json.loads(self.run(*words, "--json")))


@pytest.fixture
def shell(tiny: Path, tmp_path: Path) -> Shell:
    return Shell(tiny, tmp_path / "runs")


def list_times(run: Run) -> tuple[float, float]:
    (attempt,) = load_attempts(run)
    assert attempt.ended_at is not None
    return attempt.started_at, attempt.ended_at


def test_two_tasks_one_after_another_and_ranked(shell: Shell):
    said = shell.submit("--sweep", "training.learning_rate=1e-6,5e-3", "--set", "training.max_steps=6", "--wait")
    sweep = load_sweep(shell.runs / "tiny_gemma2-sweep-1")
    assert "tiny_gemma2-sweep-1-1 (learning_rate=0.005): completed, step 6, held-out loss" in said
    first, second = sweep.runs
    assert list_times(first)[1] <= list_times(second)[0], "one at a time"
    assert hash_adapter(first) != hash_adapter(second)
    found = shell.ask("compare", sweep.name)
    assert [row["run"] for row in found["runs"]] == [second.id, first.id], "the one that learns is the better one"
    (row,) = shell.ask("status")["runs"]
    assert (row["run"], row["state"], row["tasks"]) == (sweep.name, "COMPLETED", {"COMPLETED": 2})
    assert "nothing of tiny_gemma2-sweep-1 to resume" in shell.run("resume", sweep.name, code=5)


def test_cancel_stops_what_runs_and_what_waits_and_resume_goes_on(shell: Shell):
    """The first task would never end; the second waits for it."""
    shell.submit("--sweep", f"training.max_steps={ENDLESS},4")
    sweep: Sweep = load_sweep(shell.runs / "tiny_gemma2-sweep-1")
    first, second = sweep.runs
    assert find_own_sweep(second) == sweep
    wait_for_step(first, 6, commits=5)
    assert [row["state"] for row in shell.ask("status", sweep.name)["runs"]] == ["RUNNING", "PENDING"]
    assert "waits for its turn" in shell.run("cancel", second.id, code=5)
    assert "cancelled 2 of 2 runs" in shell.run("cancel", sweep.name)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while shell.ask("status")["runs"][0]["active"]:
        assert time.monotonic() < deadline, read_logs(first)
    (saved,) = load_attempts(first)
    assert (saved.state, load_submissions(second)) == ("SAVED", [])
    shorter = f"training.max_steps={(saved.last_committed_step or 0) + 2}"
    shell.run("resume", first.id, "--set", shorter, "--allow-drift", "training.max_steps", "--wait")
    assert load_attempts(first)[1].first_step == saved.last_committed_step
    said = shell.run("resume", sweep.name, "--wait")
    assert f"{second.id}: was never handed to a cluster; goes on from the base model" in said
    assert first.id not in said.partition("next:")[0], "it is finished"
    assert [load_attempts(run)[-1].state for run in sweep.runs] == ["COMPLETED"] * 2, read_logs(second)
