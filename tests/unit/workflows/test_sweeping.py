"""What is checked before a sweep is sent, what one sbatch gets, and that a refusal leaves nothing. Fakes on PATH."""

from __future__ import annotations

import json
import os
import pickle
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lora_jobs.errors import ClusterError, DoesNotFitError, SpecError, SubmissionError
from lora_jobs.runs import find_runs_root, find_sweep, list_runs, load_submissions
from lora_jobs.sizing import find_gpu, size_job
from lora_jobs.spec import load_spec, replace_values
from lora_jobs.workflows.sweeping import UNSIZED_KEYS, SweepReport, submit_spec

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import FakeCluster

ANSWER = "sbatch: Job 4 to start at 2026-11-20T17:46:52 using 2 processors on nodes n1 in partition big"
BATCH = "training.per_device_train_batch_size"
OTHER_VALUES = {
    "lora.lora_alpha": 99.0,
    "lora.use_rslora": True,
    "training.learning_rate": 0.5,
    "training.lr_scheduler_type": "linear",
    "training.warmup_ratio": 0.5,
    "training.warmup_steps": 7,
    "training.weight_decay": 0.5,
    "training.adam_beta1": 0.5,
    "training.adam_beta2": 0.5,
    "training.adam_epsilon": 0.5,
    "training.max_grad_norm": 0.5,
    "training.logging_steps": 7,
    "training.save_steps": 7,
    "training.early_stopping_patience": 7,
    "training.early_stopping_threshold": 0.5,
    "training.seed": 7,
}


@pytest.fixture
def slurm(cluster: FakeCluster) -> FakeCluster:
    """A fake sbatch that takes everything as job 4711."""
    cluster.answer("sbatch", ("--test-only", ANSWER), ("--parsable", "4711"))
    cluster.answer("scontrol", ("show config", "MaxArraySize            = 1001"))
    cluster.answer("srun")
    return cluster


def submit(spec: Path, *sweep: str, **options: object) -> SweepReport:
    report = submit_spec(spec, sweep=sweep, cluster="slurm", **options)  # type: ignore[arg-type]
    assert isinstance(report, SweepReport)
    return report


def list_calls(cluster: FakeCluster) -> list[str]:
    return [line.partition(f"{os.environ['LORA_JOBS_HOME']}")[0] for line in cluster.calls()]


def test_one_sbatch_and_a_run_per_combination(slurm: FakeCluster, make_spec: Callable[..., Path]):
    report = submit(make_spec(), "lora.r=8,16", "training.seed=1,2,3", throttle=2)
    assert list_calls(slurm) == ["scontrol show config", "sbatch --test-only ", "sbatch --parsable "]
    assert report.sweep is not None
    assert report.expected_start == "2026-11-20T17:46:52"
    script = report.sweep.script_path.read_text()
    assert "#SBATCH --array=0-5%2\n" in script
    for number, run in enumerate(report.sweep.runs):
        spec = load_spec(run.spec_path)
        assert (spec.lora.r, spec.training.seed, spec.sweep) == ((8, 16)[number // 3], number % 3 + 1, {})
        assert [each.job_id for each in load_submissions(run)] == [f"4711_{number}"]
        assert json.loads(run.estimate_path.read_text())["estimate"]["peak_bytes"] == report.tasks[number].peak_bytes
        assert run.script_path.read_text() == script
        task = pickle.loads((run.submitit / "task.pkl").read_bytes())  # noqa: S301
        assert (task.args, task._timeout_min) == ((str(run.directory),), 720)
    assert report.tasks[0].peak_bytes == report.tasks[2].peak_bytes < report.tasks[3].peak_bytes
    assert find_sweep("4711", find_runs_root()) == report.sweep


def test_what_does_not_fit_is_named_and_can_be_left_out(slurm: FakeCluster, make_spec: Callable[..., Path]):
    spec = make_spec()
    with pytest.raises(DoesNotFitError, match="1 of 3 do not fit") as caught:
        submit(spec, f"{BATCH}=1,2,4096")
    (problem,) = caught.value.problems
    assert problem.path == f"{BATCH}=4096"
    assert problem.message.endswith("GiB needed")
    assert "--skip-unfit" in (caught.value.hint or "")
    assert slurm.calls() == ["scontrol show config"]
    assert not find_runs_root().exists()
    report = submit(spec, f"{BATCH}=1,2,4096", skip_unfit=True)
    assert [dict(task.variant.values) for task in report.tasks] == [{BATCH: 1}, {BATCH: 2}]
    assert report.sweep is not None
    assert [each["values"] for each in report.sweep.left_out] == [{BATCH: 4096}]
    with pytest.raises(DoesNotFitError, match="1 of 1 do not fit"):
        submit(spec, f"{BATCH}=4096", skip_unfit=True)
    assert len(submit(spec, f"{BATCH}=1,4096", force=True).tasks) == 2


def test_an_array_that_is_too_long_is_refused_before_anything(slurm: FakeCluster, make_spec: Callable[..., Path]):
    slurm.answer("scontrol", ("show config", "MaxArraySize            = 5"))
    with pytest.raises(SubmissionError, match=r"the sweep has 6 tasks, an array may have 5 here"):
        submit(make_spec(), "lora.r=8,16", "training.seed=1,2,3")
    assert slurm.calls() == ["scontrol show config"]
    assert not find_runs_root().exists()


@pytest.mark.parametrize("refused", ["--test-only", "--parsable"])
def test_a_refusal_leaves_nothing(slurm: FakeCluster, make_spec: Callable[..., Path], refused: str):
    program = slurm.directory / "sbatch"
    words = "sbatch: error: Batch job submission failed: Invalid account"
    program.write_text(f'#!/bin/sh\ncase "$*" in {refused}*) echo "{words}" >&2; exit 1;; esac\necho "{ANSWER}" >&2\n')
    with pytest.raises(SubmissionError, match="sbatch refuses the job"):
        submit(make_spec(), "lora.r=8,16")
    root = find_runs_root()
    assert not root.exists() or list(root.iterdir()) == []


@pytest.mark.parametrize(("moment", "kept"), [("--test-only", 0), ("--parsable", 2)])
def test_ctrl_c_leaves_nothing_or_a_whole_sweep(
    slurm: FakeCluster, make_spec: Callable[..., Path], moment: str, kept: int
):
    """The fake sbatch presses Ctrl-C: sends SIGINT to this very process, then answers."""
    program = slurm.directory / "sbatch"
    program.write_text(
        f'#!/bin/sh\ncase "$*" in {moment}*) kill -INT {os.getpid()};; esac\n'
        f'case "$*" in --test-only*) echo "{ANSWER}" >&2;; *) echo 4711;; esac\n'
    )
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        submit(make_spec(), "lora.r=8,16")
    assert signal.getsignal(signal.SIGINT) is before
    runs = list_runs(find_runs_root())
    assert sorted(load_submissions(run)[0].job_id for run in runs) == [f"4711_{number}" for number in range(kept)]
    assert (find_sweep("4711", find_runs_root()) is not None) == bool(kept)
    assert kept or list(find_runs_root().iterdir()) == []


def test_a_dry_run_writes_nothing(slurm: FakeCluster, make_spec: Callable[..., Path]):
    report = submit(make_spec(("name: t", f"name: t\nsweep: {{{BATCH}: [1, 4096]}}")), dry_run=True)
    values = report.to_json()
    assert values["dry_run"] is True
    assert [(task["run"], task["fits"]) for task in values["tasks"]] == [("t-sweep-1-0", True), ("t-sweep-1-1", False)]
    assert slurm.calls() == ["scontrol show config"]
    assert not find_runs_root().exists()


def test_missing_data_is_said_before_anything_is_written(slurm: FakeCluster, make_spec: Callable[..., Path]):
    with pytest.raises(SpecError, match="can't be submitted yet") as caught:
        submit(make_spec(("train: train.jsonl", "train: nowhere.jsonl")), "lora.r=8,16")
    assert caught.value.problems[0].path == "data.train"
    assert not find_runs_root().exists()


def test_data_that_only_some_combinations_lack_is_said_with_their_values(
    slurm: FakeCluster, make_spec: Callable[..., Path]
):
    with pytest.raises(SpecError, match="can't be submitted yet") as caught:
        submit(make_spec(), "data.train=train.jsonl,nowhere.jsonl", "lora.r=8,16")
    assert [problem.path for problem in caught.value.problems] == ["data.train"]
    assert "nowhere.jsonl" in caught.value.problems[0].message
    assert caught.value.problems[0].message.endswith("lora.r=8 and 1 more)")
    assert not find_runs_root().exists()


def test_packages_that_only_some_combinations_need_are_asked_for(
    slurm: FakeCluster, make_spec: Callable[..., Path], bare_python: Path
):
    spec = make_spec()
    with Path("envs/here.yaml").open("a") as environment:
        environment.write(f"python: {bare_python}\n")
    with pytest.raises(ClusterError, match=r"bitsandbytes not installed \(for training.optim: paged_adamw_8bit\)"):
        submit(spec, "training.optim=adamw_torch,paged_adamw_8bit")
    dry = submit(spec, "training.optim=adamw_torch,paged_adamw_8bit", dry_run=True).to_json()
    assert dry["missing_packages"].endswith("bitsandbytes not installed (for training.optim: paged_adamw_8bit)")
    assert submit(spec, "training.optim=adamw_torch,adamw_torch_fused", dry_run=True).missing is None
    assert not find_runs_root().exists()


@pytest.mark.parametrize("options", [{"throttle": 2}, {"skip_unfit": True}])
def test_options_of_a_sweep_need_one(slurm: FakeCluster, make_spec: Callable[..., Path], options: dict[str, object]):
    with pytest.raises(SpecError, match="is for sweeps"):
        submit(make_spec(), **options)


def test_reuse_is_for_one_run(slurm: FakeCluster, make_spec: Callable[..., Path]):
    with pytest.raises(SpecError, match="--reuse is for one run"):
        submit(make_spec(), "lora.r=8", reuse=True)


@pytest.mark.parametrize("key", sorted(UNSIZED_KEYS))
def test_keys_that_are_not_sized_change_nothing_of_the_verdict(make_spec: Callable[..., Path], key: str):
    spec, gpu = load_spec(make_spec()), find_gpu("A100-64")
    evaluated = {"data.eval": "train.jsonl", "training.eval_steps": 7, "training.early_stopping_patience": 3}
    spec = replace_values(spec, evaluated)
    changed = replace_values(spec, {key: OTHER_VALUES[key]})
    assert changed != spec
    assert size_job(changed, gpu) == size_job(spec, gpu)
