"""Local runs as a user drives them: submit, kill, verify, resume, cancel; two ranks under ZeRO stage 2."""

from __future__ import annotations

import contextlib
import html
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import TIMEOUT_SECONDS, hash_adapter, read_logs, wait_for_step

from lora_jobs.checkpoints import list_checkpoints, verify_checkpoint
from lora_jobs.cluster.local import find_local_processes
from lora_jobs.runs import Run, load_metrics
from lora_jobs.workflows.report_curves import format_number
from lora_jobs.workflows.reporting import write_report

pytestmark = pytest.mark.train

SPEC = Path(__file__).resolve().parents[2] / "jobs/tiny_gemma2.yaml"
STEPS = 240
EVERY = 20
TOKENS = {"HF_TOKEN": "hf_neverWrittenAnywhere", "WANDB_API_KEY": "wandbNeverWrittenAnywhere"}


@dataclass(frozen=True)
class Shell:
    """A directory with the tiny model and its data, and a runs root of the test's own."""

    directory: Path
    runs: Path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **TOKENS, "LORA_JOBS_HOME": str(self.runs), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "lora_jobs", *arguments]
        return subprocess.run(
            command, cwd=self.directory, env=environment, capture_output=True, text=True, check=False, timeout=300
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        environment = {**os.environ, **TOKENS, "LORA_JOBS_HOME": str(self.runs), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "lora_jobs", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=self.directory, env=environment, text=True, **pipes)

    def ask(self, *arguments: str) -> dict[str, Any]:
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    def submit(self, *arguments: str) -> Run:
        sets = ("--set", f"training.max_steps={STEPS}", "--set", f"training.save_steps={EVERY}")
        return Run(Path(self.ask("submit", str(SPEC), "--cluster", "local", *sets, *arguments)["directory"]))


@pytest.fixture
def shell(tiny: Path, tmp_path: Path) -> Shell:
    return Shell(tiny, tmp_path / "runs")


@pytest.fixture(scope="module")
def whole_run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing interrupted."""
    return Shell(tiny, tmp_path_factory.mktemp("whole") / "runs").submit("--wait")


@pytest.fixture(scope="module")
def whole(whole_run: Run) -> str:
    """Hash of its adapter."""
    return hash_adapter(whole_run)


def kill_everything(run: Run) -> None:
    """kill -9 for every process of a run, launcher and ranks, until none is left."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while pids := find_local_processes(run):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_end(run: Run) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while find_local_processes(run):
        assert time.monotonic() < deadline, read_logs(run)
        time.sleep(0.1)


def list_good_steps(run: Run) -> list[int]:
    """Steps of the checkpoints that verify, newest first; what a kill left half-written is not among them."""
    verdicts = (verify_checkpoint(path) for path in list_checkpoints(run.checkpoints))
    return [verdict.step for verdict in verdicts if verdict.good and verdict.step is not None]


def submit_and_kill(shell: Shell) -> Run:
    """A run that was killed by kill -9 after its second commit."""
    run = shell.submit()
    wait_for_step(run, 2 * EVERY + 1, commits=2 * EVERY)
    kill_everything(run)
    assert not run.adapter.exists(), "killed too late to show anything"
    return run


def test_no_token_of_the_shell_is_in_any_file_of_a_run(whole_run: Run) -> None:
    """Scripts, specs, logs, what submitit pickled, checkpoints: everything that a run leaves."""
    files = [path for path in whole_run.directory.parent.rglob("*") if path.is_file()]
    assert len(files) > 20
    for token in TOKENS.values():
        assert [path for path in files if token.encode() in path.read_bytes()] == []


def test_the_report_of_a_trained_run_has_its_curves_samples_and_checkpoints(
    whole_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_JOBS_HOME", str(whole_run.directory.parent))
    rows = load_metrics(whole_run)
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    (sample,) = [row for row in rows if row["kind"] == "sample"]
    text = write_report(whole_run.id, tmp_path).read_text()
    assert all(
        f"<figcaption><b>{title}</b>" in text
        for title in ("Loss", "Learning rate", "Throughput", "Memory of one process")
    )
    drawn = re.findall(r'<path class="curve train faint" d="([^"]+)"', text)
    assert [len(re.findall(r"[ML]", path)) for path in drawn] == [STEPS]
    assert f"training from {format_number(losses[0])} to {format_number(losses[-1])}" in text
    shown = html.unescape(text)
    assert all(sample[key] in shown for key in ("prompt", "expected", "without_adapter", "with_adapter"))
    assert [path.name for path in list_checkpoints(whole_run.checkpoints) if path.name in text] == [
        f"checkpoint-{STEPS}", f"checkpoint-{STEPS - EVERY}",
    ]  # fmt: skip


def test_after_kill_9_resume_ends_with_the_same_adapter(shell: Shell, whole: str) -> None:
    run = submit_and_kill(shell)
    step = list_good_steps(run)[0]
    (status,) = shell.ask("status")["runs"]
    assert (status["state"], status["active"], status["last_committed_step"]) == ("KILLED", False, step)
    plan = shell.ask("resume", "--dry-run")
    assert (plan["resume_from"], plan["step"]) == (f"checkpoint-{step}", step)
    done = shell.run("resume", str(status["job_id"]), "--wait")
    assert done.returncode == 0, done.stderr + read_logs(run)
    assert f"goes on from checkpoint-{step}, at step {step} of {STEPS}" in done.stdout
    assert hash_adapter(run) == whole
    (status,) = shell.ask("status", run.id)["runs"]
    assert (status["state"], status["attempts"], status["step"]) == ("COMPLETED", 2, STEPS)


def test_cancel_saves_and_resume_ends_with_the_same_adapter(shell: Shell, whole: str) -> None:
    run = shell.submit()
    wait_for_step(run, 7)
    refused = shell.run("resume")
    assert (refused.returncode, "still RUNNING" in refused.stderr) == (5, True), refused.stderr
    assert shell.run("cancel").returncode == 0
    wait_for_end(run)
    (status,) = shell.ask("status")["runs"]
    assert (status["state"], status["reason"]) == ("SAVED", "saved after SIGTERM")
    assert status["last_committed_step"] == max(row["step"] for row in load_metrics(run) if row["kind"] == "train")
    assert shell.run("resume", "tiny_gemma2", "--wait").returncode == 0, read_logs(run)
    assert hash_adapter(run) == whole


def test_two_resumes_at_once_start_one_job(shell: Shell, whole: str) -> None:
    run = submit_and_kill(shell)
    both = [shell.start("resume", run.id, "--json") for _ in range(2)]
    codes = sorted(process.wait(timeout=TIMEOUT_SECONDS) for process in both)
    errors = "".join(process.communicate()[1] for process in both)
    assert codes == [0, 5], errors
    wait_for_end(run)
    assert len(run.submissions_path.read_text().splitlines()) == 2
    assert hash_adapter(run) == whole


def test_a_broken_newest_checkpoint_is_explained_and_passed_over(shell: Shell, whole: str) -> None:
    run = submit_and_kill(shell)
    newest, older, *_ = list_good_steps(run)
    shard = next((run.checkpoints / f"checkpoint-{newest}").rglob("*rank_1*optim_states.pt"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    verdicts = shell.run("verify", "--json")
    assert verdicts.returncode == 5
    good = {Path(v["path"]).name: v["good"] for v in json.loads(verdicts.stdout)["checkpoints"]}
    assert (good[f"checkpoint-{newest}"], good[f"checkpoint-{older}"]) == (False, True)
    done = shell.run("resume", "--wait")
    assert done.returncode == 0, done.stderr + read_logs(run)
    assert f"checkpoint-{newest}: BROKEN" in done.stdout
    assert f"goes on from checkpoint-{older}" in done.stdout
    assert hash_adapter(run) == whole


def test_no_good_checkpoint_stops_with_5_and_starts_over_only_when_asked(shell: Shell, whole: str) -> None:
    run = submit_and_kill(shell)
    newest = list_good_steps(run)[0]
    for manifest in run.checkpoints.glob("*/MANIFEST.json"):
        manifest.write_text("{}")
    refused = shell.run("resume")
    assert (refused.returncode, "--from-scratch" in refused.stderr) == (5, True)
    assert not find_local_processes(run)
    again = shell.run("resume", "--from-scratch", "--wait")
    assert again.returncode == 0, again.stderr + read_logs(run)
    assert (run.directory / "checkpoints-set-aside-1" / f"checkpoint-{newest}").is_dir()
    assert hash_adapter(run) == whole


def test_a_damaged_adapter_is_made_again(shell: Shell) -> None:
    run = shell.submit("--wait", "--set", "training.max_steps=2")
    before = hash_adapter(run)
    weights = run.adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert shell.run("verify").returncode == 5
    done = shell.run("resume", "--wait")
    assert done.returncode == 0, done.stderr + read_logs(run)
    assert hash_adapter(run) == before


def test_what_is_finished_is_not_trained_again(shell: Shell) -> None:
    run = shell.submit("--wait", "--set", "training.max_steps=2")
    before = hash_adapter(run)
    done = shell.run("resume")
    assert (done.returncode, "nothing to resume" in done.stdout) == (0, True)
    reused = shell.ask("submit", str(SPEC), "--cluster", "local", "--reuse", "--set", "training.max_steps=2",
                       "--set", f"training.save_steps={EVERY}")  # fmt: skip
    assert (reused["reused"], reused["run"]) == (True, run.id)
    assert hash_adapter(run) == before
    assert [path.name for path in shell.runs.iterdir()] == [run.id]


def test_a_changed_rank_is_refused_and_a_longer_time_is_not(shell: Shell) -> None:
    submit_and_kill(shell)
    refused = shell.run("resume", "--set", "lora.r=8")
    assert (refused.returncode, "lora.r: checkpoint has 4, now 8" in refused.stderr) == (5, True)
    plan = shell.ask("resume", "--dry-run", "--set", "resources.time=02:00:00")
    assert [(change["key"], change["kind"]) for change in plan["drift"]] == [("resources.time", "free")]


def test_a_row_without_completion_is_refused_by_its_line(shell: Shell) -> None:
    broken = shell.runs.parent / "broken.jsonl"
    broken.write_text('{"prompt": "a", "completion": ""}\n')
    refused = shell.run("submit", str(SPEC), "--cluster", "local", "--set", f"data.train={broken}")
    assert (refused.returncode, "line 1" in refused.stderr) == (2, True)
    assert not shell.runs.exists()


def test_a_failing_job_says_why_and_ends_with_5(shell: Shell) -> None:
    done = shell.run("submit", str(SPEC), "--cluster", "local", "--wait", "--set", "training.learning_rate=1e30")
    assert (done.returncode, "the loss is nan" in done.stdout) == (5, True), done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_dry_run_shows_the_plan_and_writes_nothing(shell: Shell) -> None:
    done = shell.run("submit", str(SPEC), "--dry-run")
    assert done.returncode == 0
    assert "#SBATCH --ntasks-per-node=2" in done.stdout
    assert '"stage": 2' in done.stdout
    assert not shell.runs.exists()
