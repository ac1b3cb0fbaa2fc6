"""A sweep as one line of status, out of what squeue says of its tasks."""

from __future__ import annotations

import getpass
import json
from datetime import datetime
from typing import TYPE_CHECKING

import pytest

from lora_jobs.cli.show_status import render_status
from lora_jobs.runs import (
    Submission,
    Sweep,
    Task,
    append_metrics,
    create_run,
    create_sweep,
    find_runs_root,
    record_array,
)
from lora_jobs.workflows.explaining import explain_job
from lora_jobs.workflows.folding import fold_ids, format_ranges
from lora_jobs.workflows.following import cancel_sweep, read_log
from lora_jobs.workflows.observing import find_status

if TYPE_CHECKING:
    from conftest import FakeCluster

FILES = {"spec.yaml": "name: a\n", "script.sbatch": "#!/bin/bash\n#SBATCH --time=00:10:00\n"}
ROW = "{job}|{state}|{reason}|big|USER|acc|normal|100|2026-11-20T10:00:00|N/A|1|10|1|gpu:1|n|(null)|(null)|a-sweep-1"


@pytest.mark.parametrize(("numbers", "text"), [([0], "0"), ([0, 1, 2, 5, 7, 8], "0-2,5,7-8"), ([], "")])
def test_ranges(numbers: list[int], text: str):
    assert format_ranges(numbers) == text


def test_ids_fold_to_their_array_even_when_a_task_went_on_as_a_job_of_its_own():
    assert fold_ids(["12_0", "12_1", "77", "12_3"]) == "12_[0-1,3]"
    assert fold_ids(["77"]) == "77"
    assert fold_ids([]) is None


@pytest.fixture
def sweep(cluster: FakeCluster) -> Sweep:
    """Six tasks of array 12: one runs, two have ended, three wait; and a run beside them."""
    root = find_runs_root()
    tasks = tuple(Task(f"a-sweep-1-{number}", {"lora.r": number}) for number in range(6))
    sweep = Sweep(root / "a-sweep-1", "a", ("lora.r",), tasks)
    create_run(root, "b-1", FILES)
    create_sweep(sweep, FILES["script.sbatch"], {task.run: FILES for task in tasks})
    record_array(sweep, Submission("12", "slurm", 1.0, "here"))
    rows = [("12_0", "RUNNING", "None"), ("12_1", "FAILED", "NonZeroExitCode"), ("12_2", "CANCELLED", "None"),
            ("12_[3-5%1]", "PENDING", "JobArrayTaskLimit")]  # fmt: skip
    text = "\n".join(ROW.format(job=job, state=state, reason=reason) for job, state, reason in rows)
    cluster.answer("squeue", ("", text.replace("USER", getpass.getuser())))
    cluster.answer("scontrol", ("", "PriorityType = priority/basic"))
    for name in ("sacct", "scancel", "sprio"):
        cluster.answer(name)
    return sweep


def test_status_folds_a_sweep_into_a_line(sweep: Sweep, cluster: FakeCluster):
    report = find_status()
    folded, single = report.runs
    assert (folded.run, folded.sweep, folded.job_id, single.run) == ("a-sweep-1", "a-sweep-1", "12_[0-5]", "b-1")
    assert folded.tasks == {"RUNNING": 1, "FAILED": 1, "CANCELLED": 1, "PENDING": 3}
    assert (folded.state, folded.active) == ("RUNNING", True)
    head, line, _ = [text.plain for text in render_status(report, width=120, now=datetime(2026, 11, 20))]
    assert head.split() == ["RUN", "JOB", "STATE"]
    assert " ".join(line.split()) == "a-sweep-1 12_[0-5] RUNNING 1/6 1 running, 3 pending, 1 cancelled, 1 failed"
    assert len([call for call in cluster.calls() if call.startswith("squeue")]) == 1


def test_the_tasks_by_name_by_array_and_by_number(sweep: Sweep):
    for job in ("a-sweep-1", "12"):
        rows = find_status(job).runs
        assert [row.state for row in rows] == ["RUNNING", "FAILED", "CANCELLED", "PENDING", "PENDING", "PENDING"]
        assert {row.sweep for row in rows} == {"a-sweep-1"}
    (row,) = find_status("12_4").runs
    assert (row.run, row.state, row.reason, row.tasks) == ("a-sweep-1-4", "PENDING", "JobArrayTaskLimit", None)


def test_why_of_a_sweep_speaks_of_a_task_that_waits(sweep: Sweep):
    answer = explain_job("a-sweep-1")
    assert (answer.run, answer.state, answer.reason) == ("a-sweep-1-3", "PENDING", "JobArrayTaskLimit")


def test_cancel_of_a_sweep_is_one_scancel(sweep: Sweep, cluster: FakeCluster):
    assert len(cancel_sweep(sweep)) == 4
    assert [call for call in cluster.calls() if call.startswith("scancel")] == ["scancel 12"]


def test_logs_of_a_sweep_stand_under_their_names(sweep: Sweep):
    for number in (0, 2):
        (sweep.runs[number].logs / f"slurm-12_{number}.out").write_text(f"log {number}\n")
    assert "".join(read_log("a-sweep-1")) == "==> a-sweep-1-0 <==\nlog 0\n\n==> a-sweep-1-2 <==\nlog 2\n\n"


def test_an_ended_sweep_names_its_best_and_the_next_step(sweep: Sweep, cluster: FakeCluster):
    cluster.answer("squeue", ("", ROW.format(job="12_[0-5]", state="CANCELLED", reason="None")))
    append_metrics(sweep.runs[0], {"kind": "eval", "step": 4, "eval_loss": 1.5, "phase": "after"})
    (row, _) = find_status().runs
    assert (row.active, row.next_step, row.tasks) == (False, "lora-jobs resume a-sweep-1", {"CANCELLED": 6})
    assert json.loads(json.dumps(row.to_json()))["sweep"] == "a-sweep-1"
