"""Status of many runs: one question per Slurm command whatever their number, and what fails degrades to a note."""

from __future__ import annotations

import getpass
import os
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lora_jobs.cli.main import app
from lora_jobs.cli.show_page import show_page
from lora_jobs.cli.show_status import describe_nothing, show_status, watch_status
from lora_jobs.cli.status_line import describe_status
from lora_jobs.errors import RunNotFoundError, SpecError
from lora_jobs.runs import (
    Run,
    Submission,
    append_metrics,
    append_submission,
    begin_attempt,
    create_run,
    end_attempt,
    find_runs_root,
)
from lora_jobs.workflows.detailing import describe_run
from lora_jobs.workflows.explaining import explain_job
from lora_jobs.workflows.observing import find_status

if TYPE_CHECKING:
    from conftest import FakeCluster

RECORDED = Path(__file__).parents[2] / "slurm_output" / "22.05"
FILES = {
    "spec.yaml": "name: a\n",
    "script.sbatch": "#!/bin/bash\n#SBATCH --time=00:10:00\n",
    "estimate.json": '{"world_size": 2, "estimate": {"peak_bytes": 9, "allocated_peak_bytes": 7}}',
}


def load(name: str) -> str:
    """A recorded answer, as if the jobs were of the user who runs this."""
    return (RECORDED / f"{name}.txt").read_text().replace("|root|", f"|{getpass.getuser()}|")


def make_run(*job_ids: str, backend: str = "slurm") -> Run:
    root = find_runs_root()
    number = len(list(root.iterdir())) + 1 if root.exists() else 1
    run = create_run(root, f"a-{number}", FILES)
    for job_id in job_ids:
        append_submission(run, Submission(job_id, backend, time.time(), "here"))
    return run


def count_calls(cluster: FakeCluster) -> dict[str, int]:
    names = [line.split()[0] for line in cluster.calls()]
    return {name: names.count(name) for name in dict.fromkeys(names)}


@pytest.fixture
def slurm(cluster: FakeCluster) -> FakeCluster:
    """Answers as recorded from the real cluster."""
    cluster.answer("squeue", ("", load("queue")))
    cluster.answer("scontrol", ("", load("scontrol_config")))
    cluster.answer("sprio", ("", load("sprio")))
    cluster.answer("sacct", ("", load("sacct")))
    cluster.answer("sinfo", ("", load("sinfo_nodes")))
    return cluster


def test_one_question_per_command_for_all_runs(slurm: FakeCluster):
    for job_id in ("10", "2", "3", "1", "5", "4000000"):
        for _ in range(3):
            make_run(job_id)
    rows = find_status(everything=True).runs
    assert count_calls(slurm) == {"squeue": 1, "scontrol": 1, "sprio": 1, "sacct": 1}
    seen = {row.job_id: (row.state, row.reason_text, row.rank, row.pending_jobs, row.expected_start) for row in rows}
    assert seen == {
        "10": ("TIMEOUT", None, None, None, None),
        "2": ("PENDING", "next, waits for free nodes", 1, 9, "2026-11-20T22:13:32"),
        "3": ("PENDING", "others go first", 2, 9, "2026-11-20T23:03:00"),
        "1": ("RUNNING", None, None, None, None),
        "5": ("PENDING", "held by you", None, None, None),
        "4000000": ("UNKNOWN", None, None, None, None),
    }
    assert {row.job_id: row.tasks for row in rows}["3"] == {"PENDING": 5}
    assert {row.job_id: (row.factors or {}).get("priority") for row in rows}["2"] == 10543


def test_twenty_are_shown_and_the_rest_is_counted(slurm: FakeCluster):
    runs = [make_run("1") for _ in range(23)]
    for run in runs[:3]:  # the oldest: reading them would fail, and be a note
        run.attempts_path.symlink_to(run.attempts_path)
    report = find_status()
    assert (len(report.runs), report.hidden, report.notes) == (20, 3, ())
    assert len(find_status(everything=True).notes) == 3
    assert len(find_status(everything=True).runs) == 23
    nowhere = find_status(partition="elsewhere")
    assert (nowhere.runs, nowhere.elsewhere) == ((), 20)
    assert describe_nothing(nowhere) == (
        "none of your runs is known to be in partition elsewhere (20 looked at); 3 older runs: lora-jobs status --all"
    )
    assert {row.job_id for row in find_status(user="root", partition="boost_usr_prod").runs} == {
        "1", "2", "3", "4", "5", "6",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("broken", "notes"),
    [
        ("squeue", ["queue not readable"]),
        ("sprio", ["priority not readable"]),
        ("scontrol", ["configuration not readable"]),
        ("sacct", ["past jobs not readable"]),
    ],
)
def test_what_fails_is_a_note_and_the_rest_stays(slurm: FakeCluster, broken: str, notes: list[str]):
    for job_id in ("2", "10"):
        make_run(job_id)
    slurm.answer(broken, ("", "it is out of order"), status=1, stderr=True)
    report = find_status()
    hidden = ["no rank in the queue"] if broken == "scontrol" and os.geteuid() != 0 else []
    assert [note.partition(":")[0] for note in report.notes] == notes + hidden
    assert "it is out of order" in report.notes[0]
    states = {row.job_id: row.state for row in report.runs}
    assert states == {
        "2": "UNREACHABLE" if broken == "squeue" else "PENDING",
        "10": "UNKNOWN" if broken == "sacct" else "TIMEOUT",
    }


@pytest.mark.parametrize(
    ("uid", "name", "places", "notes"),
    [
        (0, "root", [1, None], ["configuration not readable"]),
        (65534, "nobody", [None, None], ["configuration not readable", "no rank in the queue"]),
    ],
)
def test_no_rank_where_others_jobs_may_be_hidden(
    slurm: FakeCluster, monkeypatch: pytest.MonkeyPatch, uid: int, name: str, places: list[int | None], notes: list[str]
):
    """Without slurm.conf PrivateData is not known; root sees every job whatever it says."""
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    slurm.answer("squeue", ("", (RECORDED / "queue.txt").read_text().replace("|root|", f"|{name}|")))
    for job_id in ("10", "2"):
        make_run(job_id)
    slurm.answer("scontrol", ("", "it is out of order"), status=1, stderr=True)
    report = find_status()
    assert [note.partition(":")[0] for note in report.notes] == notes
    assert [row.rank for row in report.runs] == places
    assert report.runs[0].state == "PENDING"
    assert report.runs[0].priority == 10543


def test_a_partition_leaves_out_local_runs_and_says_so(slurm: FakeCluster, capsys: pytest.CaptureFixture[str]):
    show_status(find_status(partition="boost_usr_prod"))
    assert capsys.readouterr().out == "no runs yet: lora-jobs submit SPEC starts one\n"
    make_run("77", backend="local")
    report = find_status(partition="boost_usr_prod")
    show_status(report)
    said = "none of your runs is known to be in partition boost_usr_prod (1 looked at)\n"
    assert capsys.readouterr().out == said
    watch_status([report])
    assert capsys.readouterr().out == f"{said}\n"
    assert report.to_json()["runs_elsewhere"] == 1
    make_run("2")
    report = find_status(partition="boost_usr_prod")
    assert ([row.job_id for row in report.runs], report.elsewhere) == (["2"], 1)


@pytest.mark.parametrize("watch", [[], ["--watch"], ["--json"]])
@pytest.mark.parametrize("option", ["--partition", "--user"])
def test_a_choice_among_runs_does_not_go_with_one(slurm: FakeCluster, option: str, watch: list[str]):
    make_run("2")
    with pytest.raises(SpecError, match=f"{option} chooses among runs") as caught:
        app(["status", "2", option, "x", *watch], standalone_mode=False)
    assert caught.value.exit_code == 2
    assert slurm.calls() == []


def test_no_slurm_at_all(cluster: FakeCluster):
    run = make_run("2")
    report = find_status()
    assert report.notes == (
        "queue not readable: squeue is not on PATH",
        "past jobs not readable: sacct is not on PATH",
    )
    assert report.runs[0].state == "UNREACHABLE"
    assert describe_run(run.id).starts == ()
    assert explain_job(run.id).state == "UNREACHABLE"


def test_only_finished_or_local_runs_ask_nothing(slurm: FakeCluster):
    run = make_run("77", backend="local")
    begin_attempt(run, job_id="77", restart_count=0, backend="local", host="h", resume_from=None, first_step=0)
    end_attempt(
        run, job_id="77", restart_count=0, exit_code=1, state="FAILED", reason="it broke", last_committed_step=4
    )
    row = find_status().runs[0]
    assert (row.state, row.reason, row.next_step) == ("FAILED", "it broke", "lora-jobs resume a-1")
    assert slurm.calls() == []


def test_a_job_whose_nodes_boot_has_its_own_words(slurm: FakeCluster):
    run = make_run("2")
    slurm.answer("squeue", ("", load("queue").replace("2|PENDING|Resources", "2|CONFIGURING|Resources")))
    (row,) = find_status().runs
    assert (row.state, row.active, row.rank, row.expected_start, row.factors) == ("CONFIGURING", True, None, None, None)
    assert describe_status(row, datetime.now()) == "has its nodes, they are being made ready"
    answer = explain_job(run.id)
    assert (answer.rank, answer.expected_start, answer.factors) == (None, None, ())
    assert answer.meaning == "has its nodes, they are being made ready"
    assert answer.actions == ("nothing to do: it goes on by itself",)


@pytest.mark.parametrize(
    ("slurm_says", "shown"),
    [("NonZeroExitCode", "failed: lora-jobs resume 9 (ended with an error)"),
     ("BeginTime", "failed: lora-jobs resume 9"),
     ("NodeOnFire", "failed: lora-jobs resume 9 (NodeOnFire)")],
)  # fmt: skip
def test_why_a_job_ended_is_said_in_plain_words(slurm: FakeCluster, slurm_says: str, shown: str):
    make_run("9")
    slurm.answer("sacct", ("", load("sacct").replace("9|FAILED|3:0|None", f"9|FAILED|3:0|{slurm_says}")))
    (row,) = find_status().runs
    assert describe_status(row, datetime.now()) == shown


def test_progress_of_a_running_job(slurm: FakeCluster):
    run = make_run("1")
    attempt = begin_attempt(
        run, job_id="1", restart_count=0, backend="slurm", host="h", resume_from="checkpoint-20", first_step=20
    )
    append_metrics(run, {"kind": "train", "step": 60, "max_steps": 100, "loss": 1.5, "tokens_per_second": 9.0,
                         "memory_allocated_bytes": 6, "attempt": 1, "time": attempt.started_at + 400})  # fmt: skip
    row = find_status().runs[0]
    assert (row.step, row.total_steps, row.loss, row.tokens_per_second) == (60, 100, 1.5, 9.0)
    assert (row.memory_peak_bytes, row.predicted_bytes) == (6, 7)
    assert (row.elapsed_seconds, row.limit_seconds, row.remaining_seconds) == (7, 1800, 1793)
    finish = time.mktime(time.strptime(row.expected_finish or "", "%Y-%m-%dT%H:%M:%S"))
    assert abs(finish - (attempt.started_at + 800)) <= 1, "40 steps took 400 s, 40 are left"


def test_any_id_that_a_run_ever_had_leads_to_its_page_with_every_start(
    slurm: FakeCluster, capsys: pytest.CaptureFixture[str]
):
    run = make_run("10", "12")
    slurm.answer("sacct", ("", load("sacct").replace("\n12|", "\n99|") + load("sacct_duplicates")))
    for job_id, restart, gpus in (("10", 0, 4), ("12", 1, 1)):
        begin_attempt(run, job_id=job_id, restart_count=restart, backend="slurm", host="h", resume_from=None,
                      first_step=0, world_size=gpus)  # fmt: skip
    for job_id in ("10", "12", "a-1", "a"):
        page = describe_run(job_id)
        assert [(start.job_id, start.state, start.number) for start in page.starts] == [
            ("10", "TIMEOUT", 1),
            ("12", "REQUEUED", None),
            ("12", "COMPLETED", 2),
        ]
    assert page.gpus == 2
    assert [start.gpus for start in page.starts] == [4, 1, 1], "its own; where it has none, its job's"
    assert page.gpu_hours == round(86 * 4 / 3600, 2)
    show_page(page)
    assert "0.1 used so far, on 4 then 1 at a time" in capsys.readouterr().out
    with pytest.raises(RunNotFoundError):
        describe_run("11")


def test_why_of_a_job_of_the_queue_and_of_nobody(slurm: FakeCluster):
    answer = explain_job("6")
    assert (answer.run, answer.reason, answer.rank, answer.pending_jobs) == (None, "BeginTime", 2, 9)
    assert dict(answer.numbers)["nodes away"] == "lrdn0002 draining: broken | fan"
    assert answer.to_json()["numbers"][0]["what"] == "asks for"
    assert count_calls(slurm) == {"squeue": 1, "scontrol": 1, "sprio": 1, "sinfo": 1}
    with pytest.raises(RunNotFoundError, match="4000000"):
        explain_job("4000000")
    with pytest.raises(RunNotFoundError):
        explain_job("nobody")


def test_why_names_the_limits_of_each_qos_and_of_the_partitions_own(slurm: FakeCluster):
    """%q is a list from 24.11 on (tests/slurm_output/24.11/queue.txt)."""
    queue = load("queue").replace("BeginTime", "QOSMaxJobsPerUserLimit").replace("|normal|", "|narrow,normal|")
    slurm.answer("squeue", ("", queue))
    partition = (
        load("scontrol_partition_qos").replace("boost_urgent", "boost_usr_prod").replace("QoS=narrow", "QoS=all")
    )
    slurm.answer("scontrol", ("show config", load("scontrol_config")), ("show partition", partition))
    limits = load("sacctmgr_qos_limits")
    slurm.answer("sacctmgr", ("", limits + limits.splitlines()[1].replace("normal", "all").replace("||", "|7|", 1)))
    answer = explain_job("6")
    assert [row for row in answer.numbers if row[0].startswith("QOS ")] == [
        ("QOS narrow", "GrpTRESMins gres/gpu=6000, MaxJobsPU 1, MaxTRESPU cpu=64,gres/gpu=4"),
        ("QOS normal", "no limits of its own"),
        ("QOS all", "GrpJobs 7, of the partition"),
    ]
    assert count_calls(slurm) == {"squeue": 1, "scontrol": 2, "sprio": 1, "sinfo": 1, "sacctmgr": 1}
    assert any("show qos narrow,normal,all" in call for call in slurm.calls())


def test_why_names_the_limit_of_the_account(slurm: FakeCluster):
    slurm.answer("squeue", ("", (RECORDED / "queue.txt").read_text().replace("BeginTime", "AssocGrpGRESMinutes")))
    slurm.answer("sacctmgr", ("", load("sacctmgr_group_limits")))
    answer = explain_job("6")
    assert dict(answer.numbers)["account limit"] == "iscrc_test: GrpTRESMins gres/gpu=90000"
    assert count_calls(slurm) == {"squeue": 1, "scontrol": 1, "sprio": 1, "sinfo": 1, "sacctmgr": 1}
    slurm.answer("sacctmgr", ("", "out of order"), status=1, stderr=True)
    answer = explain_job("6")
    assert "account limit" not in dict(answer.numbers)
    assert [note.partition(":")[0] for note in answer.notes] == ["limits of the account not readable"]


def test_an_id_that_a_stranger_has_now_tells_nothing_of_the_run(slurm: FakeCluster):
    run = make_run("2")
    begin_attempt(run, job_id="2", restart_count=0, backend="slurm", host="h", resume_from=None, first_step=0)
    theirs = {
        name: (RECORDED / f"{name}.txt").read_text().replace("|root|", "|stranger|") for name in ("queue", "sacct")
    }
    slurm.answer("squeue", ("", theirs["queue"]))
    slurm.answer("sacct", ("", theirs["sacct"].replace("\n10|", "\n2|")))
    assert find_status().runs[0].state == "KILLED"
    answer = explain_job(run.id)
    assert (answer.run, answer.state, answer.priority, answer.rank) == (run.id, "KILLED", None, None)
    assert answer.actions[0] == "lora-jobs resume 2"
    page = describe_run(run.id)
    assert [(start.job_id, start.state, start.elapsed_seconds) for start in page.starts] == [("2", "RUNNING", None)]
    assert (page.factors, page.gpu_hours) == ((), 0)


def test_why_of_a_run_that_ended(slurm: FakeCluster):
    run = make_run("10")
    answer = explain_job(run.id)
    assert (answer.state, answer.turn, answer.actions[0]) == ("TIMEOUT", "you", "lora-jobs resume 10")
