"""plan, submit --plan, clusters init and doctor on the real Slurm: real forecasts, real rows, nothing left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from slurm_cluster import ACCOUNT

from lora_jobs.runs import find_run
from lora_jobs.workflows.checking import check_job
from lora_jobs.workflows.describing import init_cluster
from lora_jobs.workflows.diagnosing import diagnose
from lora_jobs.workflows.planning import plan_spec

if TYPE_CHECKING:
    from slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slurm

ENVIRONMENT = Path(__file__).with_name("test_cluster.yaml")
SPEC = """
name: planned
model: {name_or_path: google/gemma-3-270m-it, dtype: bfloat16}
lora: {r: 8}
data: {train: train.jsonl, format: text, max_length: 256}
training: {max_steps: 50, bf16: true, gradient_accumulation_steps: 8}
resources: {cluster: test_cluster.yaml, account: ACCOUNT, cpus_per_task: 2, time: "00:20:00"}
"""


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A spec of that cluster in an empty directory, with data and no runs yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_JOBS_HOME", str(tmp_path / "runs"))
    (tmp_path / "test_cluster.yaml").write_text(ENVIRONMENT.read_text())
    (tmp_path / "train.jsonl").write_text('{"text": "some words to learn"}\n' * 50)
    path = tmp_path / "job.yaml"
    path.write_text(SPEC.replace("ACCOUNT", ACCOUNT))
    return path


def lora_jobs(slurm: SlurmCluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lora_jobs", *arguments]
    environment = {**slurm.environment, "LORA_JOBS_HOME": os.environ["LORA_JOBS_HOME"]}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def fill(slurm: SlurmCluster, directory: Path) -> str:
    """A job on every GPU for half an hour; its end is when others can start."""
    script = directory / "fill.sh"
    script.write_text("#!/bin/bash\nsleep 300\n")
    answer = slurm.call(
        "sbatch", "--parsable", "--nodes=2", "--gpus-per-node=4", "--time=00:30:00",
        f"--output={directory}/fill.out", str(script),
    )  # fmt: skip
    job_id = answer.stdout.strip()
    while slurm.call("squeue", "-h", "-o", "%T", "-j", job_id).stdout.strip() != "RUNNING":
        pass
    return job_id


def ask(slurm: SlurmCluster, *options: str) -> str:
    """The start that sbatch itself forecasts."""
    argv = ("sbatch", "--test-only", f"--account={ACCOUNT}", "--cpus-per-task=2", "--time=00:20:00", *options)
    answer = slurm.call(*argv, "--wrap=true")
    match = re.search(r"to start at (\S+)", answer.stderr)
    assert match is not None, answer.stderr
    return match[1]


def test_expected_starts_are_slurms_own_and_nothing_is_queued(slurm: SlurmCluster, spec: Path, tmp_path: Path):
    filler = fill(slurm, tmp_path)
    plan = plan_spec(spec)
    starts = {row.name: row.expected_start for row in plan.rows}
    assert set(starts) == {f"{name}:{size}" for name in ("boost_usr_prod", "boost_urgent")
                           for size in ("1x1", "1x2", "1x4", "2x4")}  # fmt: skip
    sizes = {"1x1": (1, 1), "1x2": (1, 2), "1x4": (1, 4), "2x4": (2, 4)}
    wanted = {
        name: ask(
            slurm, "--partition=boost_usr_prod", f"--nodes={nodes}", f"--ntasks-per-node={gpus}",
            f"--gpus-per-node={gpus}",
        )
        for name, (nodes, gpus) in sizes.items()
    }  # fmt: skip
    assert {name: starts[f"boost_usr_prod:{name}"] for name in sizes} == wanted
    end = slurm.call("squeue", "-h", "-o", "%e", "-j", filler).stdout.strip()
    assert wanted["2x4"] >= end, "behind the job that holds the GPUs"
    assert plan.rows[0].layout.partition == "boost_urgent", "it may preempt, so it starts now"
    assert slurm.call("squeue", "-h", "-o", "%i").stdout.split() == [filler]
    assert not (tmp_path / "runs").exists()


def test_the_screen_and_the_json_say_the_same(slurm: SlurmCluster, spec: Path):
    shown = lora_jobs(slurm, "plan", str(spec))
    assert (shown.returncode, shown.stderr) == (0, "")
    assert max(len(line) for line in shown.stdout.splitlines() if ":1x" in line and "speed" not in line) <= 100
    document: dict[str, Any] = json.loads(lora_jobs(slurm, "plan", str(spec), "--json").stdout)
    assert sorted(row["row"] for row in document["rows"]) == sorted(re.findall(r"^(\S+:\dx\d) ", shown.stdout, re.M))
    finishes = [row["expected_finish"] for row in document["rows"]]
    assert None not in finishes
    assert [finish[:16] for finish in finishes] == sorted(finish[:16] for finish in finishes)


def test_submit_a_row(slurm: SlurmCluster, spec: Path, tmp_path: Path):
    slurm.call("scontrol", "update", "PartitionName=boost_urgent", "State=DOWN")  # it is to stay in the queue
    try:
        done = lora_jobs(slurm, "submit", str(spec), "--plan", "boost_urgent:2x4", "--cluster", "slurm", "--json")
        assert done.returncode == 0, done.stderr
        job_id = json.loads(done.stdout)["job_id"]
        described = slurm.call("scontrol", "show", "job", job_id).stdout
    finally:
        slurm.call("scancel", "--user=root", check=False)
        slurm.call("scontrol", "update", "PartitionName=boost_urgent", "State=UP")
    assert " Partition=boost_urgent " in described.replace("\n", " ")
    assert "NumNodes=2" in described
    assert "gres/gpu=8" in described or "gres:gpu:4" in described
    assert "TimeLimit=00:20:00" in described
    run = find_run(job_id, tmp_path / "runs")
    assert "gradient_accumulation_steps: 1" in run.spec_path.read_text()


def test_a_row_that_is_not_there(slurm: SlurmCluster, spec: Path, tmp_path: Path):
    done = lora_jobs(slurm, "submit", str(spec), "--plan", "boost_urgent:1x3", "--cluster", "slurm")
    assert done.returncode == 2
    assert "boost_urgent:1x4" in done.stderr
    assert slurm.call("squeue", "-h").stdout == ""
    assert not (tmp_path / "runs").exists()


def test_an_account_that_is_refused_is_a_rows_problem(slurm: SlurmCluster, spec: Path):
    plan = plan_spec(spec, ["resources.account=nobody"])
    assert not any(row.possible for row in plan.rows)
    assert all(row.problems[0].startswith("sbatch refuses it: this account may not be used") for row in plan.rows)


def test_init_writes_a_file_that_check_plan_and_doctor_use(slurm: SlurmCluster, spec: Path):
    path, environment, _ = init_cluster("mine")
    assert path == Path("envs/mine.yaml")
    limits = {name: (p.gpus_per_node, p.max_time, p.max_nodes) for name, p in environment.partitions.items()}
    assert limits == {
        "boost_usr_prod": (4, "1-00:00:00", 2),
        "boost_urgent": (4, "01:00:00", 2),
        "lrd_all_serial": (None, "04:00:00", 1),
    }
    report = check_job(spec, ["resources.cluster=mine"])
    assert (report.environment.name, report.gpu.name, report.verdict.fits) == ("mine", "A100-40", True)
    plan = plan_spec(spec, ["resources.cluster=mine", "training.max_steps=10"])
    assert all(row.expected_start for row in plan.rows)
    assert {"boost_usr_prod:1x4", "boost_usr_prod/boost_qos_dbg:1x4"} <= {row.name for row in plan.rows}
    assert [finding for finding in diagnose().findings if finding.area == "partitions" and finding.level != "ok"] == []


def test_doctor_sees_a_drained_partition(slurm: SlurmCluster, spec: Path):
    slurm.call("scontrol", "update", "NodeName=big0001", "State=DRAIN", "Reason=test")
    try:
        found = {finding.name: finding for finding in diagnose().findings}
    finally:
        slurm.call("scontrol", "update", "NodeName=big0001", "State=RESUME")
    assert (found["lrd_all_serial"].level, "1 drained" in found["lrd_all_serial"].message) == ("warning", True)
    assert (found["boost_usr_prod"].level, found["version"].level) == ("ok", "ok")
    assert found["account"].message.startswith(("iscrc_test", "root"))
    done = lora_jobs(slurm, "doctor", "--json")
    assert json.loads(done.stdout)["findings"]
    assert (done.returncode, done.stderr) in {(0, ""), (4, "")}
