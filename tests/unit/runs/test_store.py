"""Run directories: made whole or not at all, numbered without a race, found by whatever name a user has."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest

from lora_jobs.errors import RunError, RunExistsError, RunNotFoundError
from lora_jobs.runs import (
    Run,
    Submission,
    append_submission,
    begin_attempt,
    create_run,
    discard_run,
    find_run,
    find_runs_root,
    list_runs,
    next_run_id,
)

if TYPE_CHECKING:
    from pathlib import Path

FILES = {"spec.yaml": "name: a\n", "script.sbatch": "#!/bin/bash\n"}


def make(root: Path, run_id: str, *, at: int, jobs: tuple[str, ...] = ()) -> Run:
    """A run whose files were last written `at` seconds."""
    run = create_run(root, run_id, FILES)
    for job_id in jobs:
        append_submission(run, Submission(job_id, "slurm", float(at), "login01"))
    for path in (run.spec_path, run.submissions_path):
        if path.exists():
            os.utime(path, (at, at))
    return run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def list_names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_root_is_named_or_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LORA_JOBS_HOME", raising=False)
    assert find_runs_root() == tmp_path / "runs"
    monkeypatch.setenv("LORA_JOBS_HOME", "")
    assert find_runs_root() == tmp_path / "runs"
    monkeypatch.setenv("LORA_JOBS_HOME", "elsewhere")
    assert find_runs_root() == tmp_path / "elsewhere"
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv("LORA_JOBS_HOME", "~/runs")
    assert find_runs_root() == tmp_path / "me" / "runs"


def test_a_run_and_its_files(root: Path) -> None:
    run = create_run(root, "gemma-1", FILES)
    assert (run.id, run.name, run.directory) == ("gemma-1", "gemma", root / "gemma-1")
    assert run.directory.stat().st_mode & 0o777 == 0o700
    assert list_names(run.directory) == ["checkpoints", "logs", "script.sbatch", "spec.yaml"]
    assert run.spec_path.read_text() == "name: a\n"
    assert run.script_path.stat().st_mode & 0o777 == 0o600
    paths = [run.deepspeed_path, run.estimate_path, run.environment_path, run.attempts_path, run.submissions_path]
    paths += [run.metrics_path, run.logs, run.checkpoints, run.adapter, run.submitit]
    assert [path.relative_to(run.directory).as_posix() for path in paths] == [
        "deepspeed.json",
        "estimate.json",
        "environment.json",
        "attempts.jsonl",
        "submissions.jsonl",
        "metrics.jsonl",
        "logs",
        "checkpoints",
        "adapter",
        "submitit",
    ]
    discard_run(run)
    assert list_names(root) == []


def test_ids_count_up_by_name(root: Path) -> None:
    assert next_run_id(root, "a") == "a-1"
    for run_id in ("a-1", "a-9", "a-10", "a-b-30", "ab-40", "a-2-50"):
        create_run(root, run_id, FILES)
    (root / "a-99").write_text("no directory")
    (root / "a-11").mkdir()
    assert next_run_id(root, "a") == "a-12"
    assert next_run_id(root, "a-b") == "a-b-31"
    assert next_run_id(root, "a-2") == "a-2-51"
    assert next_run_id(root, "a.b") == "a.b-1"


def test_an_id_is_taken_once(root: Path) -> None:
    create_run(root, "a-1", FILES)
    with pytest.raises(RunExistsError, match="a-1 is there already"):
        create_run(root, "a-1", {"spec.yaml": "other"})
    assert (root / "a-1" / "spec.yaml").read_text() == "name: a\n"


def test_of_many_at_once_one_gets_the_id(root: Path) -> None:
    barrier = threading.Barrier(8)
    made, refused = [], []

    def submit(writer: int) -> None:
        barrier.wait()
        try:
            made.append((writer, create_run(root, "a-1", {"spec.yaml": f"{writer}"})))
        except RunExistsError:
            refused.append(writer)

    threads = [threading.Thread(target=submit, args=(writer,)) for writer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ((writer, run),) = made
    assert len(refused) == 7
    assert run.spec_path.read_text() == f"{writer}"


@pytest.mark.parametrize("run_id", ["../a-1", "a/b-1", "/a-1", "a", "-1", "a-", "a-1\n", "a-1/..", ".a-1", "a b-1", ""])
def test_strange_ids_make_nothing(tmp_path: Path, root: Path, run_id: str) -> None:
    with pytest.raises(RunError, match="is no run id"):
        create_run(root, run_id, FILES)
    assert list_names(tmp_path) == []


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", ".hidden", "", "a\n"])
def test_files_stay_in_the_run(tmp_path: Path, root: Path, name: str) -> None:
    with pytest.raises(RunError, match="is no plain file name"):
        create_run(root, "a-1", {**FILES, name: "x"})
    assert list_names(tmp_path) == []


def test_nothing_half_written_is_left(tmp_path: Path, root: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        create_run(root, "a-1", {"script.sbatch": "x", "spec.yaml": "\ud800"})
    assert list_names(tmp_path) == []
    create_run(root, "a-1", FILES)
    with pytest.raises(RunError, match=r"cannot write .*a-2/n+: File name too long") as caught:
        create_run(root, "a-2", {**FILES, "n" * 255: "x"})
    assert str(root / "a-2") in caught.value.message
    assert list_names(root) == ["a-1"]


def test_a_root_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"cannot make the directory .*a-1: ") as caught:
        create_run(tmp_path / "file" / "runs", "a-1", FILES)
    assert caught.value.hint is not None
    with pytest.raises(RunError, match="cannot list"):
        list_runs(tmp_path / "file")


def test_a_directory_without_a_spec_is_no_run(root: Path) -> None:
    (root / "a-1" / "logs").mkdir(parents=True)
    (root / "notes.txt").write_text("x")
    assert list_runs(root) == []
    with pytest.raises(RunNotFoundError):
        find_run("a-1", root)


def test_runs_are_listed_by_their_last_submission(root: Path) -> None:
    assert list_runs(root) == []
    make(root, "a-1", at=100)
    make(root, "b-1", at=300)
    make(root, "a-2", at=200)
    make(root, "c-1", at=300)
    assert [run.id for run in list_runs(root)] == ["c-1", "b-1", "a-2", "a-1"]
    append_submission(Run(root / "a-1"), Submission("7", "local", 1.0, "here"))
    assert [run.id for run in list_runs(root)] == ["a-1", "c-1", "b-1", "a-2"]
    assert find_run(None, root).id == "a-1"


def test_a_run_is_found_by_id_name_job_and_directory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(root, "gemma-9", at=300, jobs=("41", "12_3"))
    make(root, "gemma-10", at=200, jobs=("42",))
    run = make(root, "llama-1", at=100, jobs=("43", "50_[0-3]"))
    begin_attempt(run, job_id="44", restart_count=0, backend="slurm", host="n1", resume_from=None, first_step=0)
    wanted = {
        "gemma-9": "gemma-9",
        "gemma": "gemma-10",
        "llama": "llama-1",
        "41": "gemma-9",
        "12_3": "gemma-9",
        "12": "gemma-9",
        "12_4": "gemma-9",
        "42": "gemma-10",
        "43": "llama-1",
        "44": "llama-1",
        "50_2": "llama-1",
        str(root / "gemma-9"): "gemma-9",
        "runs/llama-1": "llama-1",
        "./runs/llama-1/": "llama-1",
        "runs/gemma-9/../llama-1": "llama-1",
    }
    monkeypatch.chdir(root.parent)
    assert {job: find_run(job, root).id for job in wanted} == wanted
    assert find_run("runs/llama-1", root).directory == root / "llama-1"


def test_a_job_id_that_came_twice_means_the_newer_run(root: Path) -> None:
    make(root, "a-1", at=100, jobs=("77",))
    make(root, "a-2", at=200, jobs=("77",))
    assert find_run("77", root).id == "a-2"


def test_the_exact_job_id_goes_before_the_array_s(root: Path) -> None:
    make(root, "a-1", at=100, jobs=("12_1",))
    make(root, "a-2", at=200, jobs=("12_2",))
    assert [find_run(job, root).id for job in ("12_1", "12_2", "12")] == ["a-1", "a-2", "a-2"]
    assert [find_run(job, root).id for job in ("12_[1-2%1]", "12_[0-10:5]")] == ["a-2", "a-2"]


@pytest.mark.parametrize(
    "job", ["../outside-1", "runs/../../outside-1", "..", ".", "", "a-1/", "a\0b", "~nobody/x", "-1"]
)
def test_an_id_never_leaves_the_root(tmp_path: Path, job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "home" / "runs"
    make(root, "a-1", at=1)
    create_run(tmp_path / "home", "outside-1", FILES)
    (tmp_path / "cwd" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd" / "deep")
    with pytest.raises(RunNotFoundError) as caught:
        find_run(job, root)
    assert caught.value.message.isprintable()


def test_near_names_are_offered(root: Path) -> None:
    with pytest.raises(RunNotFoundError, match="no runs in") as caught:
        find_run(None, root)
    assert caught.value.hint == "lora-jobs submit SPEC starts one"
    make(root, "gemma-1", at=1)
    with pytest.raises(RunNotFoundError) as caught:
        find_run("gema-1", root)
    assert caught.value.message == f"no run 'gema-1' in {root}; did you mean gemma-1 or gemma?"
    assert caught.value.exit_code == 5
    with pytest.raises(RunNotFoundError, match="no run '999' in"):
        find_run("999", root)


def test_every_job_id_that_a_run_ever_had_leads_to_it(tmp_path: Path) -> None:
    """A requeue keeps the id, a resume gives a new one, a task of an array has one of its own beside the array's."""
    first, second, swept = (create_run(tmp_path, f"{name}-1", {"spec.yaml": "name: a\n"}) for name in ("a", "b", "c"))
    for run, job_ids in ((first, ["100", "250"]), (second, ["123_4"]), (swept, ["123_5"])):
        for job_id in job_ids:
            append_submission(run, Submission(job_id, "slurm", 1.0, "login"))
    for restart in (0, 1, 2):
        begin_attempt(
            first, job_id="100", restart_count=restart, backend="slurm", host="n", resume_from=None, first_step=0
        )
    begin_attempt(second, job_id="300", restart_count=0, backend="slurm", host="n", resume_from=None, first_step=0)
    wanted = {"100": first, "250": first, "123_4": second, "123_5": swept, "300": second}
    assert {job: find_run(job, tmp_path) for job in wanted} == wanted
    assert find_run("123_[5-9]", tmp_path) in {second, swept}, "a row of squeue: the array's newest run"
    assert find_run("123", tmp_path) in {second, swept}
    for stranger in ("1", "12", "1234", "50", "123_44x"):
        with pytest.raises(RunNotFoundError):
            find_run(stranger, tmp_path)
