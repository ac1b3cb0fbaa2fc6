"""What is rendered, compared whole with tests/golden.

After a wanted change, `UPDATE_GOLDEN=1 .venv/bin/pytest tests/unit/rendering/test_golden.py` writes the files anew;
read the difference before committing it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lora_jobs.rendering import build_deepspeed_config, build_plan, render_array_script, render_deepspeed, render_script
from lora_jobs.spec import parse_environment, parse_spec

if TYPE_CHECKING:
    from collections.abc import Callable

GOLDEN = Path(__file__).parents[2] / "golden"

TINY = """
name: tiny
model: {name_or_path: org/tiny-model}
lora: {r: 8}
data: {train: train.jsonl}
training: {max_steps: 3}
resources: {cluster: somewhere, time: "00:30:00"}
"""


@dataclass(frozen=True)
class Case:
    """One rendered script: overrides of the tiny spec, the environment's file, the run directory."""

    environment: str
    overrides: tuple[str, ...] = ()
    run: str = "/runs/tiny-1"
    python: str = "/venv/bin/python"


CASES = {
    "everything": Case(
        environment="""
            scheduler: slurm
            partitions: {boost_usr_prod: {gpu: A100-64}}
            modules: [profile/deeplrn, cuda/12.6]
            environment: {HF_HUB_OFFLINE: "1", HF_HOME: "/scratch/project/it's here"}
        """,
        overrides=(
            "resources.partition=boost_usr_prod",
            "resources.account=IscrC_project",
            "resources.qos=boost_qos_dbg",
            "resources.reservation=s_tra_lora",
            'resources.constraint="a100&(rack1|rack2)"',
            "resources.nodes=2",
            "resources.gpus_per_node=4",
            "resources.cpus_per_task=8",
            "resources.mem=480G",
            "resources.time=1-00:00:00",
            "resume.signal_seconds=300",
        ),
    ),
    "gres": Case(
        environment="{scheduler: slurm, gpu_option: gres, default_partition: gpu, partitions: {gpu: {}}}",
        overrides=("resources.gpus_per_node=2", 'resources.mem="1536"', "resume.auto=false"),
    ),
    "plain": Case(
        environment="{scheduler: local, gpu_option: none}",
        overrides=('resources.time="1"',),
        run="/home/me/my runs/100%/it's #1/tiny-1",
        python="/home/me/my venv/bin/python",
    ),
}
DEEPSPEED = {
    "zero2": ("deepspeed={zero_stage: 2}",),
    "zero2_bf16_buckets": (
        "deepspeed={zero_stage: 2, allgather_bucket_size: 500000000, reduce_bucket_size: 500000000}",
        "training.bf16=true",
    ),
    "zero2_offload": ("deepspeed={zero_stage: 2, offload_optimizer: true}",),
    "zero2_torch_autocast": ("deepspeed={zero_stage: 2, torch_autocast: true}", "training.bf16=true"),
    "zero3_fp16": ("deepspeed={zero_stage: 3, overlap_comm: true}", "training.fp16=true", "model.dtype=float32"),
}


def _compare(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def _render(case: Case) -> str:
    return render_script(
        parse_spec(TINY, source="tiny.yaml", overrides=case.overrides),
        parse_environment(case.environment, name="somewhere", file="envs/somewhere.yaml"),
        run_id="tiny-1",
        run_directory=Path(case.run),
        python=case.python,
    )


@pytest.mark.parametrize("name", CASES)
def test_script(name: str) -> None:
    _compare(f"script_{name}.sbatch", _render(CASES[name]))


def _render_array(directory: str = "/runs/it's 100%/tiny-sweep-1") -> str:
    return render_array_script(
        parse_spec(TINY, source="tiny.yaml", overrides=["resources.array_task_throttle=4"]),
        parse_environment("{scheduler: slurm, partitions: {gpu: {}}}", name="somewhere", file="envs/somewhere.yaml"),
        name="tiny-sweep-1",
        directory=Path(directory),
        python="/venv/bin/python",
        tasks=1000,
    )


def test_array_script() -> None:
    _compare("script_array.sbatch", _render_array())


@pytest.mark.parametrize("name", DEEPSPEED)
def test_deepspeed(name: str) -> None:
    config = build_deepspeed_config(parse_spec(TINY, source="tiny.yaml", overrides=DEEPSPEED[name]))
    assert config is not None
    _compare(f"deepspeed_{name}.json", render_deepspeed(config))


@pytest.mark.parametrize("name", [*CASES, "array"])
def test_shellcheck_has_nothing_to_say(name: str, tmp_path: Path) -> None:
    script = tmp_path / "script.sbatch"
    script.write_text(_render_array() if name == "array" else _render(CASES[name]))
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, "--norc", "--shell=bash", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_plan_holds_every_file_of_the_run(
    build_spec: Callable[..., Any], build_environment: Callable[..., Any]
) -> None:
    spec = build_spec("deepspeed={zero_stage: 2}")
    environment = build_environment(modules=["cuda/12.6"], environment={"HF_HUB_OFFLINE": "1"})
    plan = build_plan(
        spec,
        environment,
        backend="slurm",
        run_id="tiny-1",
        run_directory=Path("/runs/tiny-1"),
        python="/venv/bin/python",
        estimate={"fits": True, "problems": []},
        versions={"lora-jobs": "0.1", "torch": None},
    )
    script = render_script(
        spec, environment, run_id="tiny-1", run_directory=Path("/runs/tiny-1"), python="/venv/bin/python"
    )
    assert plan.script == script
    assert parse_spec(plan.files["spec.yaml"], source="spec.yaml") == spec
    assert {name: text for name, text in plan.files.items() if name != "spec.yaml"} == {
        "script.sbatch": script,
        "deepspeed.json": (GOLDEN / "deepspeed_zero2.json").read_text(),
        "estimate.json": '{\n  "fits": true,\n  "problems": []\n}\n',
        "environment.json": (GOLDEN / "environment.json").read_text(),
    }
    assert plan.to_json() == {
        "run": "tiny-1",
        "directory": "/runs/tiny-1",
        "backend": "slurm",
        "environment": "somewhere",
        "python": "/venv/bin/python",
        "script": script,
        "deepspeed": plan.deepspeed,
        "files": ["deepspeed.json", "environment.json", "estimate.json", "script.sbatch", "spec.yaml"],
    }


def test_a_job_without_deepspeed_has_no_deepspeed_file(
    build_spec: Callable[..., Any], build_environment: Callable[..., Any]
) -> None:
    plan = build_plan(
        build_spec(),
        build_environment(),
        backend="local",
        run_id="tiny-1",
        run_directory=Path("/runs/tiny-1"),
        python="/venv/bin/python",
        estimate={},
        versions={},
    )
    assert (plan.deepspeed, sorted(plan.files)) == (
        None,
        ["environment.json", "estimate.json", "script.sbatch", "spec.yaml"],
    )
