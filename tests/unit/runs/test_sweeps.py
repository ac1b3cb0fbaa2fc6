"""A sweep is there as a whole or not at all; its tasks are runs like any other, found by every name they have."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest

from lora_jobs.errors import RunError, RunExistsError
from lora_jobs.runs import (
    Run,
    Submission,
    Sweep,
    Task,
    append_submission,
    create_run,
    create_sweep,
    derive_submission,
    discard_sweep,
    find_own_sweep,
    find_run,
    find_sweep,
    group_by_sweep,
    list_runs,
    load_submissions,
    load_sweep,
    next_run_id,
    next_sweep_name,
    record_array,
)

if TYPE_CHECKING:
    from pathlib import Path

ARRAY = Submission("4711", "slurm", 5.0, "login")


def make_sweep(root: Path, tasks: int = 3) -> Sweep:
    name = next_sweep_name(root, "a")
    runs = tuple(Task(f"{name}-{number}", {"lora.r": number + 1}) for number in range(tasks))
    sweep = Sweep(root / name, "a", ("lora.r",), runs, 2, ({"values": {"lora.r": 99}, "peak_bytes": 7},))
    create_sweep(
        sweep, "#!/bin/bash\n", {task.run: {"spec.yaml": "name: a\n", "submitit/task.pkl": b"x"} for task in runs}
    )
    return sweep


def test_a_sweep_is_a_directory_with_a_run_per_task(tmp_path: Path):
    root = tmp_path / "runs"
    sweep = make_sweep(root)
    assert load_sweep(sweep.directory) == sweep
    assert [run.id for run in sweep.runs] == ["a-sweep-1-0", "a-sweep-1-1", "a-sweep-1-2"]
    run = sweep.runs[1]
    assert (run.name, sweep.find_values(run), find_own_sweep(run)) == ("a-sweep-1", {"lora.r": 2}, sweep)
    assert sorted(path.name for path in run.directory.iterdir()) == ["checkpoints", "logs", "spec.yaml", "submitit"]
    assert (run.submitit / "task.pkl").read_bytes() == b"x"
    modes = {stat.S_IMODE(path.stat().st_mode) for path in [sweep.directory, *sweep.directory.rglob("*")]}
    assert modes == {0o700, 0o600}
    assert (next_sweep_name(root, "a"), next_run_id(root, "a")) == ("a-sweep-2", "a-1")


def test_tasks_are_found_by_every_name(tmp_path: Path):
    first, sweep = make_sweep(tmp_path), make_sweep(tmp_path)
    record_array(sweep, ARRAY)
    run = sweep.runs[2]
    for job in ("4711_2", "a-sweep-2-2", str(run.directory)):
        assert find_run(job, tmp_path) == run
        assert find_sweep(job, tmp_path) is None
    for job in ("4711", "4711_[0-2]", "a-sweep-2", str(sweep.directory)):
        assert find_sweep(job, tmp_path) == sweep
    assert find_sweep("a-sweep-1", tmp_path) == first
    assert find_sweep("471", tmp_path) is None
    assert find_sweep("../a-sweep-1", tmp_path) is None
    assert len(list_runs(tmp_path)) == 6


def test_without_a_name_the_newest_sweep_is_meant_until_a_task_of_it_is_resumed(tmp_path: Path):
    sweep = make_sweep(tmp_path)
    record_array(sweep, ARRAY)
    assert find_sweep(None, tmp_path) == sweep
    append_submission(sweep.runs[1], Submission("9", "slurm", 9.0, "h"))
    os.utime(sweep.runs[1].submissions_path, (2e9, 2e9))
    assert list_runs(tmp_path)[0] == sweep.runs[1]
    assert find_sweep(None, tmp_path) is None
    single = create_run(tmp_path, "b-1", {"spec.yaml": "name: b\n"})
    os.utime(single.spec_path, (3e9, 3e9))
    assert find_sweep(None, tmp_path) is None


def test_the_array_is_recorded_in_every_run(tmp_path: Path):
    sweep = make_sweep(tmp_path)
    record_array(sweep, ARRAY)
    for number, run in enumerate(sweep.runs):
        (found,) = load_submissions(run)
        assert found == Submission(f"4711_{number}", "slurm", 5.0, "login")


def test_a_record_that_was_cut_off_is_made_up_from_the_sweeps_own(tmp_path: Path):
    sweep = make_sweep(tmp_path)
    assert derive_submission(sweep.runs[2]) is None
    record_array(sweep, ARRAY)
    sweep.runs[2].submissions_path.unlink()
    derived = derive_submission(sweep.runs[2])
    assert derived is not None
    assert (derived.job_id, derived.backend) == ("4711_2", "slurm")


def test_without_its_index_there_is_no_sweep_and_no_run_of_it(tmp_path: Path):
    sweep = make_sweep(tmp_path)
    (sweep.directory / "sweep.json").unlink()
    assert list_runs(tmp_path) == []
    assert find_sweep("a-sweep-1", tmp_path) is None
    assert next_sweep_name(tmp_path, "a") == "a-sweep-2", "its name is not given away"


def test_a_write_that_fails_leaves_nothing(tmp_path: Path):
    root = tmp_path / "runs"
    sweep = Sweep(root / "a-sweep-1", "a", (), (Task("a-sweep-1-0", {}), Task("a-sweep-1-1", {})))
    with pytest.raises(KeyError):
        create_sweep(sweep, "", {"a-sweep-1-0": {"spec.yaml": ""}})
    with pytest.raises(RunError, match="cannot write"):
        create_sweep(sweep, "", {task.run: {"no/such/folder": ""} for task in sweep.tasks})
    assert not root.exists()


def test_a_name_is_given_once_and_discarding_takes_all_away(tmp_path: Path):
    sweep = make_sweep(tmp_path)
    with pytest.raises(RunExistsError):
        create_sweep(sweep, "", {})
    assert len(list_runs(tmp_path)) == 3
    discard_sweep(sweep)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_index_is_said(tmp_path: Path):
    sweep = make_sweep(tmp_path)
    (sweep.directory / "sweep.json").write_text('{"tasks": 3}')
    with pytest.raises(RunError, match=r"sweep\.json is damaged"):
        find_sweep("a-sweep-1", tmp_path)
    assert len(list_runs(tmp_path)) == 3, "its runs are still there"


def test_runs_of_one_sweep_stand_together(tmp_path: Path):
    sweep = make_sweep(tmp_path)
    single = create_run(tmp_path, "b-1", {"spec.yaml": "name: b\n"})
    mixed = [sweep.runs[0], single, sweep.runs[2]]
    assert group_by_sweep(mixed) == {sweep.directory: (sweep.runs[0], sweep.runs[2]), single: (single,)}
    assert group_by_sweep([Run(tmp_path / "c")]) == {Run(tmp_path / "c"): (Run(tmp_path / "c"),)}
