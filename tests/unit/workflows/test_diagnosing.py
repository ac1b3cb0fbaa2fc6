"""doctor: what is right, what is not, and the next step; every finding from programs on PATH and files."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lora_jobs import __version__
from lora_jobs.cluster.surroundings import Quota, list_cached_models, parse_lfs_quota, parse_quota, read_interpreter
from lora_jobs.errors import ClusterError
from lora_jobs.workflows import diagnosing
from lora_jobs.workflows.diagnosing import diagnose
from lora_jobs.workflows.examining_packages import list_requirements
from lora_jobs.workflows.findings import split_version

if TYPE_CHECKING:
    from conftest import FakeCluster

    from lora_jobs.workflows.findings import Finding

RECORDED = Path(__file__).parents[2] / "slurm_output" / "22.05"
GOOD = {
    "accelerate": "1.15.0", "datasets": "5.2.0", "deepspeed": "0.19.8", "peft": "0.21.2", "safetensors": "0.8.0",
    "torch": "2.13.0", "transformers": "5.23.0", "trl": "1.16.0", "lora-jobs": __version__, "submitit": "1.5.4",
    "bitsandbytes": "0.50.2", "flash-attn": None,
}  # fmt: skip


def look(name: str, area: str | None = None, *, cluster: str | None = None) -> list[Finding]:
    """The findings of that name; of all of them each that is not ok has its next step."""
    found = diagnose(cluster).findings
    assert [finding for finding in found if finding.level != "ok" and not finding.next] == []
    return [finding for finding in found if finding.name == name and area in (None, finding.area)]


def write_python(directory: Path, cuda: str | None = "12.8", **changed: str | None) -> None:
    """An interpreter that says it holds these versions, and an environment file that names it."""
    packages = {**GOOD, **{name.replace("_", "-"): version for name, version in changed.items()}}
    answer = json.dumps({"python": "3.11.9", "prefix": "/x", "cuda": cuda, "packages": packages})
    program = directory / "python-of-the-job"
    program.write_text(f"#!/bin/sh\necho banner\necho '{answer}'\n")
    program.chmod(0o755)
    Path("envs").mkdir(exist_ok=True)
    Path("envs/job.yaml").write_text(f"scheduler: local\npython: {program}\n")


def test_the_recorded_cluster(cluster: FakeCluster):
    cluster.answer_as_recorded()
    found = {f"{finding.area}/{finding.name}": finding for finding in diagnose().findings}
    seen = {key: (finding.level, finding.message) for key, finding in found.items()}
    assert seen["slurm/version"] == ("ok", "22.05.8")
    assert seen["slurm/accounting"] == ("ok", "slurmdbd; enforced: associations,limits,qos")
    assert seen["slurm/priority"] == (
        "ok", "multifactor: age 1000, fairshare 10000, jobsize 1000, partition 2000, qos 4000",
    )  # fmt: skip
    assert seen["partitions/lrd_all_serial"] == (
        "ok", "1 node; no GPUs; limit 04:00:00; at most 1 node a job; 1 idle",
    )  # fmt: skip
    assert seen["accounts/qos boost_qos_dbg"] == ("ok", "priority 10; MaxWall 00:30:00; MaxTRES node=2")
    assert [call.split()[0] for call in cluster.calls()] == ["scontrol", "sinfo", "scontrol", "sacctmgr", "sacctmgr"]


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "level", "message"),
    [
        ("accounting", "scontrol_config", "storage/slurmdbd", "storage/none", "warning", "forgets"),
        ("priority", "scontrol_config", "priority/multifactor", "priority/basic", "warning", "no factors"),
        ("scheduler", "scontrol_config", "sched/backfill", "sched/builtin", "warning", "no expected starts"),
        ("privacy", "scontrol_config", "PrivateData             = none", "PrivateData = jobs,users", "warning", "rank"),
        ("version", "scontrol_config", "= 22.05.8", "= 19.05.5", "warning", "older"),
        ("lrd_all_serial", "sinfo", "64000|idle", "64000|drained", "warning", "1 drained"),
        ("boost_urgent", "scontrol_partition", "OFF State=UP", "OFF State=DRAIN", "warning", "DRAIN"),
        ("accounts", "sacctmgr_assoc", "leotest", "other", "wrong", "has none on leotest"),
    ],
)  # fmt: skip
def test_what_another_site_has(
    cluster: FakeCluster, name: str, file: str, old: str, new: str, level: str, message: str
):
    text = (RECORDED / f"{file}.txt").read_text()
    assert old in text
    cluster.answer_as_recorded(**{file: text.replace(old, new)})
    (finding,) = look(name)
    assert finding.level == level
    assert message in finding.message


def test_an_environment_file_that_promises_too_much(cluster: FakeCluster):
    cluster.answer_as_recorded()
    Path("envs").mkdir()
    Path("envs/leotest.yaml").write_text(
        "scheduler: slurm\npartitions:\n"
        "  boost_usr_prod: {gpu: A100-64, gpus_per_node: 8, max_time: '3-00:00:00'}\n  gone: {gpu: A100-64}\n"
    )
    wrong = [finding for finding in diagnose().findings if finding.area == "partitions" and finding.level != "ok"]
    assert [(finding.name, finding.level, finding.message.partition("says ")[2]) for finding in wrong] == [
        ("boost_usr_prod", "wrong", "8 GPUs a node, Slurm 4"),
        ("boost_usr_prod", "wrong", "max_time 3-00:00:00, Slurm 1-00:00:00"),
        ("gone", "warning", ""),
    ]
    assert [finding.level for finding in look("envs", "accounts")] == ["warning"]


def test_no_slurm_and_a_controller_that_is_away(cluster: FakeCluster):
    assert [(finding.level, finding.message) for finding in look("Slurm")] == [
        ("warning", "not here: jobs run on this machine only")
    ]
    cluster.answer_as_recorded()
    cluster.answer("scontrol", ("", "Unable to contact slurm controller"), status=1, stderr=True)
    (finding,) = look("answers")
    assert (finding.level, "`scontrol ping`" in (finding.next or "")) == ("wrong", True)
    assert [(finding.level, finding.message) for finding in look("version")] == [("ok", "22.05.8")]


def test_one_table_that_is_not_readable(cluster: FakeCluster):
    cluster.answer_as_recorded()
    cluster.answer("sinfo", ("", "out of order"), status=1, stderr=True)
    (finding,) = look("answers")
    assert (finding.level, finding.message) == ("warning", "nodes not readable: out of order")


def test_no_account_where_none_is_needed(cluster: FakeCluster):
    config = (RECORDED / "scontrol_config.txt").read_text().replace("= associations,limits,qos", "= none")
    cluster.answer_as_recorded(scontrol_config=config, sacctmgr_assoc="")
    (finding,) = look("accounts")
    assert (finding.level, (finding.next or "").startswith("leave resources.account out")) == ("warning", True)


def test_weights_of_resources_are_named(cluster: FakeCluster):
    old = "PriorityWeightTRES      = (null)"
    config = (RECORDED / "scontrol_config.txt").read_text()
    assert old in config
    cluster.answer_as_recorded(scontrol_config=config.replace(old, "PriorityWeightTRES = cpu=1000,gres/gpu=2000"))
    (finding,) = look("priority")
    assert finding.message.endswith("qos 4000, tres cpu=1000,gres/gpu=2000")


def test_no_finding_of_the_source_is_without_a_next_step():
    """Each Finding(...) whose level may be another than ok says what to do."""
    calls = [
        (path.name, call)
        for path in Path(diagnosing.__file__).parent.glob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Finding"
    ]
    levels = [(name, call, call.args[2]) for name, call in calls]
    maybe = [
        (name, call) for name, call, level in levels if not (isinstance(level, ast.Constant) and level.value == "ok")
    ]
    assert len(maybe) > 25
    silent = [(name, call.lineno) for name, call in maybe if len(call.args) < 5 or ast.unparse(call.args[4]) == "None"]
    assert silent == []


def test_the_compilers(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch):
    (compiler,), (toolkit,) = look("C compiler"), look("CUDA toolkit")
    assert (compiler.level, toolkit.level) == ("warning", "ok")
    assert compiler.message.startswith("none on PATH")
    assert compiler.next == "add a module such as gcc to modules: in the environment file"
    cluster.answer("clang")
    cluster.answer("nvcc")
    (compiler,), (toolkit,) = look("C compiler"), look("CUDA toolkit")
    assert (compiler.level, compiler.message) == ("ok", f"{cluster.directory}/clang (here; compute nodes may differ)")
    assert toolkit.message == f"{cluster.directory}/nvcc"
    cluster.answer("gcc")
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda")
    (compiler,), (toolkit,) = look("C compiler"), look("CUDA toolkit")
    assert (compiler.message.split()[0], toolkit.message) == (f"{cluster.directory}/gcc", "/opt/cuda")


@pytest.mark.parametrize(
    ("changed", "name", "level", "words"),
    [
        ({}, "torch", "ok", "2.13.0, CUDA 12.8"),
        ({"torch": "2.7.0+cu118"}, "torch", "wrong", "CVE-2026-24747"),
        ({"torch": "2.9.1"}, "torch", "wrong", "fixed in 2.10"),
        ({"torch": "2.5.1"}, "torch", "wrong", "CVE-2025-32434"),
        ({"torch": "2.10.0"}, "torch", "ok", "2.10.0"),
        ({"cuda": None}, "torch", "warning", "without CUDA"),
        ({"trl": "1.17.0"}, "trl", "wrong", "wanted ==1.16.0"),
        ({"transformers": "4.52.3"}, "transformers", "wrong", "wanted >=5.23"),
        ({"peft": None}, "training packages", "wrong", "not installed: peft"),
        ({"bitsandbytes": None}, "bitsandbytes", "warning", "no 4-bit"),
        ({"bitsandbytes": "0.41.3"}, "bitsandbytes", "warning", "0.41.3"),
        ({"flash_attn": "2.8.3"}, "flash-attn", "ok", "2.8.3"),
        ({"lora_jobs": "0.0.1"}, "lora-jobs", "wrong", "would not read"),
    ],
)
def test_the_jobs_packages(
    cluster: FakeCluster, tmp_path: Path, changed: dict[str, str | None], name: str, level: str, words: str
):
    write_python(tmp_path, **changed)
    (finding,) = look(name, cluster="job")
    assert (finding.level, words in finding.message) == (level, True), finding
    assert finding.level == "ok" or finding.next is not None


def test_an_interpreter_that_is_not_there(cluster: FakeCluster):
    Path("envs").mkdir()
    Path("envs/job.yaml").write_text("scheduler: local\npython: /nowhere/python\n")
    (finding,) = look("python", cluster="job")
    assert (finding.level, finding.next) == ("wrong", "correct python: in envs/job.yaml")


def test_the_real_interpreter_is_asked_without_importing_anything():
    found = read_interpreter(sys.executable, ["pydantic", "no-such-package"])
    assert found.python == sys.version.split()[0]
    assert found.packages["no-such-package"] is None
    assert found.packages["pydantic"]
    with pytest.raises(ClusterError, match="can't be asked"):
        read_interpreter("/bin/false", [])


def test_requirements_come_from_the_packages_metadata():
    found = list_requirements()
    assert found["torch"] == (">=", "2.10")
    assert found["trl"] == ("==", "1.16.0")
    assert set(found) == set(GOOD) - {"lora-jobs", "submitit", "bitsandbytes", "flash-attn"}


@pytest.mark.parametrize(
    ("older", "newer"), [("2.9.1", "2.10"), ("2.10.0", "2.10.1"), ("2.7.0+cu118", "2.10"), ("", "0.1")]
)
def test_versions_compare_as_numbers(older: str, newer: str):
    assert split_version(older) < split_version(newer)


def test_quota_of_quota_and_of_lustre():
    """Columns after quota(1) with -w, and lfs-quota(1); a star marks what is over its limit."""
    text = (
        "Disk quotas for user me (uid 1000): \n"
        "     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace\n"
        "server:/home  1048576* 1000000 2000000   6days     120       0       0       0\n"
    )
    assert parse_quota(text) == [Quota("server:/home", 2**30, 1000000 * 1024, 120, None)]
    lustre = "/leonardo_work/project\n    524288  0 1048576 - 1000 0 20000 -\n"
    assert parse_lfs_quota(lustre) == [Quota("/leonardo_work/project", 2**29, 2**30, 1000, 20000)]
    assert parse_quota("none") == parse_lfs_quota("") == []


def test_a_full_quota_is_wrong(cluster: FakeCluster):
    cluster.answer("quota", ("", "/dev/x 95 90 100 - 5 0 0 -"))
    (finding,) = look("quota")
    assert (finding.level, finding.next is not None) == ("wrong", True)


def test_models_of_the_cache_and_the_offline_switches(
    cluster: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (finding,) = look("offline")
    assert (finding.level, "cache is empty" in finding.message) == ("warning", True)
    (tmp_path / "hf/hub/models--google--gemma-2-9b-it/snapshots/abc").mkdir(parents=True)
    (tmp_path / "hf/hub/models--half/snapshots").mkdir(parents=True)
    assert list_cached_models(tmp_path / "hf/hub") == ["google/gemma-2-9b-it"]
    (finding,) = look("offline")
    assert (finding.level, finding.message) == ("ok", "HF_HUB_OFFLINE set; cached: google/gemma-2-9b-it")


def test_secrets_are_never_shown(cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    assert "hf_very_secret" not in json.dumps(diagnose().to_json())
    assert [finding.message for finding in look("token")] == ["there"]
