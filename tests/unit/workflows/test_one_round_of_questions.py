"""The commands as a user types them, with fake Slurm programs on PATH: each is asked once at most, for all runs."""

from __future__ import annotations

import getpass
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from lora_jobs.cluster.parsers import QUEUE_FORMAT
from lora_jobs.runs import (
    Submission,
    Sweep,
    Task,
    append_submission,
    begin_attempt,
    create_run,
    create_sweep,
    end_attempt,
    find_runs_root,
    record_array,
)

if TYPE_CHECKING:
    from conftest import FakeCluster

FILES = {"spec.yaml": "name: a\n", "script.sbatch": "#!/bin/bash\n#SBATCH --time=00:10:00\n"}
TIMES = "2026-11-20T10:00:00|N/A|0:00|10:00|1|gres/gpu:1||(null)|(null)"
ENDED = "{}|{}|1:0|None|big|USER|acc|normal|9|2026-11-20T10:00:00|2026-11-20T10:00:01|2026-11-20T10:01:00|59|10|1|n|a"
# Row of squeue or sacct by job: the newest jobs of 24 runs, and a sweep's five.
QUEUE = [f"{100 + number}|PENDING|Priority|big|USER|acc|normal|{900 - number}|{TIMES}|a" for number in range(1, 21)]
QUEUE += [
    f"12_[3-4]|PENDING|JobArrayTaskLimit|big|USER|acc|normal|50|{TIMES}|s",
    f"12_1|PENDING|BeginTime|big|USER|acc|normal|50|{TIMES}|s",  # requeued: a job of its own in the queue
    f"60|PENDING|Dependency|big|USER|acc|normal|40|{TIMES}|s",  # task 2, resumed
    f"500|PENDING|Resources|big|other|acc|normal|990|{TIMES}|theirs",
]
PAST = [ENDED.format(100 + number, "TIMEOUT") for number in range(21, 25)]
PAST += [ENDED.format("12_0", "FAILED"), ENDED.format("12_2", "CANCELLED by 0"), ENDED.format("12_1", "REQUEUED")]


@pytest.fixture
def slurm(cluster: FakeCluster) -> FakeCluster:
    root = find_runs_root()
    tasks = tuple(Task(f"s-sweep-1-{number}", {"lora.r": number}) for number in range(5))
    sweep = Sweep(root / "s-sweep-1", "s", ("lora.r",), tasks)
    root.mkdir()
    create_sweep(sweep, FILES["script.sbatch"], {task.run: FILES for task in tasks})
    record_array(sweep, Submission("12", "slurm", 1.0, "here"))
    append_submission(sweep.runs[2], Submission("60", "slurm", 2.0, "here"))
    for number in range(1, 25):
        append_submission(create_run(root, f"a-{number}", FILES), Submission(str(100 + number), "slurm", 2.0, "here"))
    user = getpass.getuser()
    cluster.answer("squeue", ("", "\n".join(QUEUE).replace("USER", user)))
    cluster.answer("sacct", ("", "\n".join(PAST).replace("USER", user)))
    cluster.answer("scontrol", ("show config", "PriorityType = priority/multifactor"), ("", ""))
    cluster.answer("sprio", ("", "101|899|1|2|3|4|5|0|0|0|0\n12|50|1|2|3|4|5|0|0|0|0\n60|40|1|2|3|4|5|0|0|0|0"))
    cluster.answer("sinfo", ("", "big|up|1-00:00:00|1-4|4|reserved|n[1-4]|none"))
    cluster.answer("sacctmgr")
    return cluster


def ask(*words: str) -> dict[str, Any]:
    argv = [sys.executable, "-m", "lora_jobs", *words, "--json"]
    done = subprocess.run(argv, env=dict(os.environ), capture_output=True, text=True, check=True)
    document = json.loads(done.stdout)
    assert isinstance(document, dict)
    return document


def test_the_queue_is_asked_for_with_hidden_partitions(slurm: FakeCluster):
    ask("status")
    (asked,) = [call for call in slurm.calls() if call.startswith("squeue ")]
    assert asked == f"squeue -h --all --states=all -o {QUEUE_FORMAT}"


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (("status",), {"squeue": 1, "scontrol": 1, "sprio": 1, "sacct": 1}),
        (("status", "--all", "--user", "other", "--partition", "big"),
         {"squeue": 1, "scontrol": 1, "sprio": 1, "sacct": 1}),
        (("status", "a-1"), {"squeue": 1, "scontrol": 1, "sprio": 1, "sacct": 1}),
        (("status", "s-sweep-1"), {"squeue": 1, "scontrol": 1, "sprio": 1, "sacct": 1}),
        (("why", "a-1"), {"squeue": 1, "scontrol": 2, "sprio": 1, "sinfo": 1}),
        (("why", "s-sweep-1"), {"squeue": 1, "scontrol": 2, "sprio": 1, "sacct": 1, "sinfo": 1}),
        (("why", "a-24"), {"squeue": 1, "sacct": 1}),
        (("why", "500"), {"squeue": 1, "scontrol": 2, "sprio": 1, "sinfo": 1}),
    ],
)  # fmt: skip
def test_each_program_is_asked_once_at_most(slurm: FakeCluster, words: tuple[str, ...], asked: dict[str, int]):
    """scontrol has two answers: the configuration, and the reservations where nodes of the partition are reserved."""
    ask(*words)
    calls = slurm.calls()
    names = [call.split()[0] for call in calls]
    assert {name: names.count(name) for name in dict.fromkeys(names)} == asked
    assert len(set(calls)) == len(calls)


def test_a_folded_row_means_its_tasks_also_after_a_requeue_and_a_resume(slurm: FakeCluster):
    rows = {row["run"]: (row["job_id"], row["state"], row["reason"]) for row in ask("status", "s-sweep-1")["runs"]}
    assert rows == {
        "s-sweep-1-0": ("12_0", "FAILED", None),
        "s-sweep-1-1": ("12_1", "PENDING", "BeginTime"),
        "s-sweep-1-2": ("60", "PENDING", "Dependency"),
        "s-sweep-1-3": ("12_3", "PENDING", "JobArrayTaskLimit"),
        "s-sweep-1-4": ("12_4", "PENDING", "JobArrayTaskLimit"),
    }
    for job, run in {"12_2": "s-sweep-1-2", "60": "s-sweep-1-2", "12_1": "s-sweep-1-1", "12_4": "s-sweep-1-4"}.items():
        assert ask("status", job)["runs"][0]["run"] == run
    line = ask("status", "--all")["runs"][-1]
    assert (line["run"], line["tasks"]) == ("s-sweep-1", {"FAILED": 1, "PENDING": 4})


def test_what_is_finished_is_not_asked_for(slurm: FakeCluster):
    run = create_run(find_runs_root(), "b-1", FILES)
    append_submission(run, Submission("77", "local", 3.0, "here"))
    begin_attempt(run, job_id="77", restart_count=0, backend="local", host="h", resume_from=None, first_step=0)
    end_attempt(
        run, job_id="77", restart_count=0, exit_code=1, state="FAILED", reason="it broke", last_committed_step=4
    )
    assert ask("status", "b-1")["runs"][0]["state"] == "FAILED"
    assert ask("why", "b-1")["meaning"].endswith("(it broke)")
    assert slurm.calls() == []
