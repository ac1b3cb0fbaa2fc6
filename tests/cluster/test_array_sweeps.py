"""A sweep on a real Slurm: one array, a run per task, ranked; a task that was cancelled goes on by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from slurm_cluster import ACCOUNT

from lora_jobs.checkpoints import verify_checkpoint
from lora_jobs.errors import ClusterError, SubmissionError
from lora_jobs.runs import find_run, find_runs_root, list_runs, load_attempts, load_submissions
from lora_jobs.workflows.observing import find_status, observe_runs
from lora_jobs.workflows.sweeping import SweepReport, submit_spec

if TYPE_CHECKING:
    from slurm_cluster import SlurmCluster

    from lora_jobs.runs import Run, Sweep

pytestmark = [pytest.mark.slurm, pytest.mark.train]

SPEC = Path(__file__).parents[2] / "jobs" / "tiny_gemma2.yaml"
ENDLESS = 100_000
SECONDS = 400.0


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_JOBS_HOME", str(tmp_path / "runs"))
    return tmp_path / "runs"


def overrides(tiny_files: Path, *more: str) -> list[str]:
    data = json.dumps(f"{tiny_files}/data/tiny/prompt.jsonl")
    return [
        f"model.name_or_path={json.dumps(f'{tiny_files}/models/tiny_gemma2')}",
        f"data.train={data}",
        f"data.eval={data}",
        f"resources.cluster={json.dumps(f'{tiny_files}/test_cluster.yaml')}",
        f"resources.account={ACCOUNT}",
        "resources.gpus_per_node=1",
        "training.save_steps=2",
        *more,
    ]


def submit(tiny_files: Path, *sweep: str, more: tuple[str, ...] = (), **options: Any) -> Sweep:
    report = submit_spec(SPEC, overrides(tiny_files, *more), sweep=sweep, cluster="slurm", **options)
    assert isinstance(report, SweepReport)
    assert report.sweep is not None
    return report.sweep


def ask(*words: str, code: int = 0) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "lora_jobs", *words, "--json"], capture_output=True, text=True, check=False,
        env={**os.environ}, timeout=120,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return dict(json.loads(done.stdout))


def wait_until(sweep: Sweep, ready: Any) -> None:
    deadline = time.monotonic() + SECONDS
    while not ready(statuses := {status.run: status for status in observe_runs(sweep.runs, ranked=False).runs}):
        assert time.monotonic() < deadline, f"{statuses}\n{read_logs(sweep)}"
        time.sleep(0.25)


def read_logs(sweep: Sweep) -> str:
    paths = [path for run in sweep.runs for path in sorted(run.logs.iterdir())]
    return "\n".join(f"--- {path}\n{path.read_text()[-1500:]}" for path in paths)


def read_job(run: Run) -> str:
    return load_submissions(run)[-1].job_id


def test_an_array_to_ranked_adapters_and_a_cancelled_task_that_goes_on(slurm: SlurmCluster, tiny_files: Path):
    """Three tasks at once: two end by themselves, the third would never and is cancelled, then resumed shorter."""
    sweep = submit(tiny_files, f"training.max_steps=4,8,{ENDLESS}", more=("training.eval_steps=2",))
    array = read_job(sweep.runs[0]).partition("_")[0]
    queued = slurm.call("squeue", "-h", "-r", "--states=all", "-n", sweep.name, "-o", "%i %j").stdout.split("\n")
    assert sorted(filter(None, queued)) == [f"{array}_{number} {sweep.name}" for number in range(3)]
    assert [read_job(run) for run in sweep.runs] == [f"{array}_0", f"{array}_1", f"{array}_2"]
    (row,) = find_status().runs
    assert (row.run, row.job_id, sum((row.tasks or {}).values())) == (sweep.name, f"{array}_[0-2]", 3)
    endless = sweep.runs[2]
    wait_until(sweep, lambda seen: (seen[endless.id].last_committed_step or 0) >= 2)
    wait_until(sweep, lambda seen: [seen[run.id].state for run in sweep.runs[:2]] == ["COMPLETED"] * 2)
    assert ask("status")["runs"][0]["tasks"] == {"COMPLETED": 2, "RUNNING": 1}
    done = subprocess.run([sys.executable, "-m", "lora_jobs", "cancel", f"{array}_2"], check=True, capture_output=True)
    assert endless.id.encode() in done.stdout
    wait_until(sweep, lambda seen: not seen[endless.id].active and slurm.is_idle())
    plan = ask("resume", sweep.name, "--dry-run")
    assert [each["run"] for each in plan["runs"]] == [endless.id]
    last = load_attempts(endless)[0].last_committed_step or 0
    sent = ask("resume", f"{array}_2", "--set", f"training.max_steps={last + 2}", "--allow-drift", "training.max_steps")
    assert sent["job_id"].isdecimal()
    wait_until(sweep, lambda seen: seen[endless.id].state == "COMPLETED")
    first, second = load_attempts(endless)
    assert (first.job_id, second.job_id, second.first_step) == (f"{array}_2", sent["job_id"], last)
    assert all(verify_checkpoint(run.adapter).good for run in sweep.runs)
    assert find_run(f"{array}_1", find_runs_root()) == sweep.runs[1]
    assert (sweep.runs[0].submitit / f"{array}_0_submitted.pkl").exists()
    assert list((sweep.runs[0].logs).glob(f"slurm-{array}_0.out"))
    found = ask("compare", sweep.name)
    losses = [each["best_eval_loss"] for each in found["runs"]]
    assert losses == sorted(losses)
    assert (found["sweep"], found["by"], {each["run"] for each in found["runs"]}) == (
        sweep.name, "eval_loss", {run.id for run in sweep.runs},
    )  # fmt: skip
    assert all(each["gpu_hours"] > 0 and each["tokens_per_second"] > 0 for each in found["runs"])
    assert ask("status", sweep.name)["runs"][1]["values"] == {"training.max_steps": 8}


def test_throttle_and_cancel_all(slurm: SlurmCluster, tiny_files: Path):
    sweep = submit(tiny_files, "lora.r=2,4,8", more=(f"training.max_steps={ENDLESS}",), throttle=1)
    array = read_job(sweep.runs[0]).partition("_")[0]
    wait_until(sweep, lambda seen: seen[sweep.runs[0].id].state == "RUNNING")
    wait_until(sweep, lambda seen: seen[sweep.runs[1].id].reason == "JobArrayTaskLimit")
    (row,) = find_status().runs
    assert row.tasks == {"RUNNING": 1, "PENDING": 2}
    assert ask("why", sweep.name)["reason"] == "JobArrayTaskLimit"
    assert ask("status", array)["sweep"] == sweep.name
    subprocess.run([sys.executable, "-m", "lora_jobs", "cancel", sweep.name], check=True, capture_output=True)
    wait_until(sweep, lambda seen: not any(status.active for status in seen.values()) and slurm.is_idle())


def test_what_the_cluster_refuses_leaves_nothing(slurm: SlurmCluster, tiny_files: Path, home: Path):
    with pytest.raises(ClusterError, match="this account may not be used by you"):
        submit(tiny_files, "lora.r=2,4", more=("resources.account=nobody",))
    seeds = ",".join(str(number) for number in range(501))
    with pytest.raises(SubmissionError, match=r"1,002 tasks, an array may have 1,001 here \(MaxArraySize") as caught:
        submit(tiny_files, "lora.r=2,4", f"training.seed={seeds}")
    assert caught.value.exit_code == 4
    assert not home.exists() or list(home.iterdir()) == []
    assert list_runs(home) == []
    assert slurm.call("squeue", "-h").stdout == ""
