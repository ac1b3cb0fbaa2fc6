"""What users mistype: one clear message, the right exit code, and with --json one JSON document."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_jobs.errors import SpecError
from lora_jobs.runs import create_run
from lora_jobs.spec import load_spec
from lora_jobs.workflows.following import read_log
from lora_jobs.workflows.starting import init_spec

ROOT = Path(__file__).resolve().parents[3]


def lora_jobs(directory: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LORA_JOBS_HOME": str(directory / "runs"), **variables}
    command = [sys.executable, "-m", "lora_jobs", *arguments]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("words", [("status", "--jsn"), ("check", "nowhere.yaml"), ("why", "nothing")])
def test_every_error_is_a_document_with_json(words: tuple[str, ...], tmp_path: Path):
    done = lora_jobs(tmp_path, *words, "--json")
    document = json.loads(done.stdout)
    assert document["exit_code"] == done.returncode
    assert done.returncode in {2, 5}
    assert done.stderr.startswith(f"error: {document['error']}\n")


def test_schema_takes_json(tmp_path: Path):
    assert json.loads(lora_jobs(tmp_path, "schema", "--json").stdout) == json.loads(
        lora_jobs(tmp_path, "schema").stdout
    )


def test_a_broken_environment_stands_beside_the_others(tmp_path: Path):
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs" / "broken.yaml").write_text("scheduler: pbs\n")
    done = lora_jobs(tmp_path, "clusters", "--json")
    document = json.loads(done.stdout)
    assert done.returncode == 2
    assert {row["cluster"] for row in document["clusters"]} == {"leonardo", "local"}
    assert [error["error"] for error in document["errors"]] == ["envs/broken.yaml: 1 problem"]
    assert "wanted one of slurm, local, got 'pbs'" in done.stderr


@pytest.mark.parametrize("name", ["null", "yes", "a.b", "true"])
def test_a_name_that_yaml_takes_for_something_else_is_quoted(name: str, tmp_path: Path):
    assert load_spec(init_spec(tmp_path / f"{name}.yaml").path).name == name


@pytest.mark.parametrize("name", ["a b", "x: y", "1abc", '"q', "é"])
def test_a_name_that_can_be_no_job_s_writes_nothing(name: str, tmp_path: Path):
    with pytest.raises(SpecError, match="is no name for a job"):
        init_spec(tmp_path / f"{name}.yaml")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_can_not_be_written_is_named_with_what_to_do(tmp_path: Path):
    (tmp_path / "file").write_text("")
    done = lora_jobs(tmp_path, "init", "file/job")
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr == (
        "error: cannot write file/job.yaml: file: File exists\n"
        "next: choose a place that you may write to, with -o FILE or by another name\n"
    )
    done = lora_jobs(tmp_path, "init", "/proc/job")
    assert done.returncode == 5
    assert done.stderr.startswith("error: cannot write /proc/job.yaml: ")
    assert "\nnext: choose a place that you may write to" in done.stderr


def test_a_working_directory_that_was_deleted_is_said_to_be(tmp_path: Path):
    (tmp_path / "gone").mkdir()
    command = f'cd gone && rmdir "$PWD" && exec {sys.executable} -m lora_jobs init job'
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr == (
        "error: the directory that this shell is in does not exist any more\nnext: cd to one that does, and try again\n"
    )


def test_a_dry_run_warns_of_packages_that_are_not_there(tmp_path: Path, bare_python: Path):
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs" / "here.yaml").write_text(f"scheduler: local\npython: {bare_python}\n")
    init_spec(tmp_path / "job.yaml")
    dry = ("submit", "job.yaml", "--dry-run", "--set", "resources.cluster=here", "--set")
    done = lora_jobs(tmp_path, *dry, "training.optim=paged_adamw_8bit")
    assert done.returncode == 0
    assert done.stdout.startswith("dry run: nothing was sent.")
    warning, hint = done.stderr.splitlines()
    assert warning == (
        f"warning: before submitting: the job would run in {bare_python}, which can't train it: "
        "bitsandbytes not installed (for training.optim: paged_adamw_8bit)"
    )
    assert hint.startswith(f"next: {bare_python} -m pip install")
    assert lora_jobs(tmp_path, *dry, "training.optim=adamw_torch").stderr == ""


def test_a_number_where_text_is_wanted_shows_the_shell_s_quotes(tmp_path: Path):
    with pytest.raises(SpecError) as caught:
        load_spec(init_spec(tmp_path / "a.yaml").path, ["resources.time=10"])
    assert caught.value.problems[0].message.endswith("""in a shell: --set 'resources.time="10"')""")
    assert load_spec(tmp_path / "a.yaml", ['resources.time="10"']).resources.time == "10"


def test_a_log_s_half_written_character_is_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LORA_JOBS_HOME", str(tmp_path))
    run = create_run(tmp_path, "a-1", {"spec.yaml": "name: a\n"})
    (run.logs / "attempt-1.out").write_bytes("Schritt für".encode()[:-2])  # within the two bytes of ü
    assert list(read_log("a-1")) == ["Schritt f�"]
    (run.logs / "attempt-1.out").write_bytes("Schritt für".encode())
    assert list(read_log("a-1")) == ["Schritt für"]


def test_what_the_libraries_refuse_names_its_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from lora_jobs.cli.screen import show_error
    from lora_jobs.errors import Problem, SpecError

    one, other = Problem("training.fp16", "needs a GPU"), Problem("lora.r", "is 0")
    show_error(SpecError("needs a GPU", problems=[one]))
    show_error(SpecError("needs a GPU; is 0", problems=[one, other]))
    assert capsys.readouterr().err == (
        "error: training.fp16: needs a GPU\nerror: needs a GPU; is 0\n  training.fp16: needs a GPU\n  lora.r: is 0\n"
    )


def test_an_exact_check_where_torch_is_missing_names_the_environment_that_needs_it(tmp_path: Path):
    python = tmp_path / "bin" / "job-python"
    python.parent.mkdir()
    # -S: without site-packages, where torch is. The trace's first lines need no package.
    python.write_text(
        f'#!/bin/sh\n# A fake interpreter of a job without torch, for tests.\nexec {sys.executable} -S "$@"\n'
    )
    python.chmod(0o755)
    (tmp_path / "here.yaml").write_text("scheduler: local\npython: job-python\n")
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "job.yaml").write_text(
        "name: job\nmodel: {name_or_path: smollm2-135m}\nlora: {r: 8}\ndata: {train: train.jsonl}\n"
        "training: {max_steps: 1}\nresources: {cluster: ./here.yaml, gpu: A100-80}\n"
    )
    variables = {"PATH": f"{python.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = lora_jobs(tmp_path, "check", "job.yaml", "--exact", **variables)
    assert done.returncode == 2, done.stderr
    assert "error: --exact: torch is not installed for " in done.stderr
    assert "pip install '.[train]'" in done.stderr
    assert lora_jobs(tmp_path, "check", "job.yaml", **variables).returncode == 0


def test_a_run_that_has_lost_its_spec_is_listed_and_not_resumed(tmp_path: Path):
    directory = tmp_path / "runs" / "job-1"
    directory.mkdir(parents=True, mode=0o700)
    line = '{"job_id": "5000005", "backend": "local", "submitted_at": 1.0, "host": "elsewhere"}\n'
    (directory / "submissions.jsonl").write_text(line)
    assert "job-1" in lora_jobs(tmp_path, "status").stdout
    done = lora_jobs(tmp_path, "resume", "job-1")
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.startswith(f"error: job-1 has lost its spec.yaml: {directory}/spec.yaml\nnext: submit its spec")
