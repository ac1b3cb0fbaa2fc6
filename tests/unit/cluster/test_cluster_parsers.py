"""Slurm's text to values, over answers that a real Slurm gave (tests/slurm_output, recorded by record.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_jobs.cluster.parsers import (
    Factors,
    SlurmJob,
    is_job_id,
    match_ids,
    parse_sacct,
    parse_sprio,
    parse_state,
    parse_submitted,
    parse_tasks,
    parse_test_only,
    read_queued_job,
)
from lora_jobs.errors import OutputError

RECORDED = Path(__file__).parents[2] / "slurm_output" / "22.05"


def load(name: str) -> str:
    return (RECORDED / f"{name}.txt").read_text()


def read_rows(text: str) -> list[SlurmJob]:
    """Jobs of squeue.txt: recorded before the dependency and the reservation were asked for, ahead of the name."""
    rows = [line.split("|", 15) for line in text.splitlines()]
    return [read_queued_job([*row[:15], "(null)", "N/A", row[15]]) for row in rows]


def test_squeue_of_every_state():
    jobs = read_rows(load("squeue"))
    assert [(job.job_id, job.state, job.reason) for job in jobs] == [
        ("8", "COMPLETED", None),
        ("9", "FAILED", "NonZeroExitCode"),
        ("10", "TIMEOUT", "TimeLimit"),
        ("11", "NODE_FAIL", "NodeDown"),
        ("12", "COMPLETED", None),
        ("13", "CANCELLED", None),
        ("14", "RUNNING", None),
        ("15", "PENDING", "Resources"),
        ("16_[0-3,7%2]", "PENDING", "Priority"),
        ("17", "PENDING", "Dependency"),
        ("18", "PENDING", "JobHeldUser"),
        ("19", "PENDING", "BeginTime"),
    ]
    assert jobs[0].name == "a|b", "the name may hold the separator"
    assert jobs[6] == SlurmJob(
        job_id="14",
        state="RUNNING",
        reason=None,
        partition="boost_usr_prod",
        user="root",
        account="iscrc_test",
        qos="normal",
        priority=5543,
        submitted="2026-11-20T20:01:29",
        started="2026-11-20T20:01:29",
        expected_start=None,
        ended=None,
        elapsed_seconds=7,
        limit_seconds=1800,
        nodes=2,
        gpus="gres:gpu:4",
        node_list="lrdn[0001-0002]",
        name="job.sh",
        exit_code=None,
        source="squeue",
    )
    assert [(job.started, job.expected_start) for job in jobs[7:10]] == [
        (None, "2026-11-20T20:31:29"),
        (None, "2026-11-20T21:21:00"),
        (None, None),
    ], "what has not started has an expected start, and none where Slurm computed none"


def test_sacct_of_every_state():
    jobs = parse_sacct(load("sacct"))
    assert [(job.job_id, job.state, job.exit_code, job.elapsed_seconds) for job in jobs] == [
        ("8", "COMPLETED", "0:0", 0),
        ("9", "FAILED", "3:0", 0),
        ("10", "TIMEOUT", "0:0", 86),
        ("11", "NODE_FAIL", "0:0", 0),
        ("12", "COMPLETED", "0:0", 0),
        ("13", "CANCELLED", "0:0", 0),
        ("14", "RUNNING", "0:0", 7),
        ("15", "PENDING", "0:0", 0),
        ("16_[0-3,7%2]", "PENDING", "0:0", 0),
    ]
    assert (jobs[2].started, jobs[2].ended) == ("2026-11-20T20:00:01", "2026-11-20T20:01:27")
    assert (jobs[7].started, jobs[7].ended, jobs[7].node_list) == (None, None, None)


def test_sacct_shows_each_attempt_of_a_requeued_job_when_asked():
    rows = parse_sacct(load("sacct_duplicates"))
    assert [(row.job_id, row.state) for row in rows] == [("12", "REQUEUED"), ("12", "COMPLETED")]


def test_sprio():
    assert parse_sprio(load("sprio")) == {
        "2": Factors(10543, 0, 10000, 344, 200, 0, 0, 0, 0, 0),
        "3": Factors(10371, 0, 10000, 172, 200, 0, 0, 0, 0, 0),
    }


def test_sprio_with_tres_and_negative_nice():
    found = parse_sprio("7|900|1|2|3|4|5|CPU=10,GRES/gpu=90|0|-100|9\n")
    assert found["7"] == Factors(900, 1, 2, 3, 4, 5, 100, 0, -100, 9)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (load("test_only"), "2026-11-20T19:59:57"),
        (
            "sbatch: Job 4 to start at 2026-01-02T03:04:05 a using 2 processors on nodes n1 in partition p",
            "2026-01-02T03:04:05",
        ),
        (
            "welcome to the cluster\nsbatch: Job 4 to start at 2026-01-02T03:04:05 using 8 processors on lrdn0001",
            "2026-01-02T03:04:05",
        ),
        ("sbatch: Job 4 to start at Unknown using 2 processors on nodes n1 in partition p", None),
        ("", None),
    ],
)
def test_test_only(text: str, wanted: str | None):
    assert parse_test_only(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("CANCELLED by 1001", "CANCELLED"),
        ("CANCELLED+", "CANCELLED"),
        ("completed", "COMPLETED"),
        ("BOILING_OVER", "BOILING_OVER"),
        ("", "UNKNOWN"),
    ],
)
def test_state(text: str, wanted: str):
    assert parse_state(text) == wanted


def test_a_state_nobody_knows_is_shown_as_it_is():
    line = load("squeue").splitlines()[6].replace("RUNNING", "BOILING_OVER")
    assert [(job.state, job.pending) for job in read_rows(line)] == [("BOILING_OVER", False)]


def test_banner_lines_are_passed_over():
    text = "*** maintenance on Monday | see motd ***\n\n" + load("sacct")
    assert parse_sacct(text) == parse_sacct(load("sacct"))


@pytest.mark.parametrize("text", ["<html>502 Bad Gateway</html>\n", "1|2\n", "\x00\x01\x02|\n"])
def test_garbage_is_quoted(text: str):
    with pytest.raises(OutputError) as caught:
        parse_sacct(text)
    assert caught.value.line == text.splitlines()[0]


def test_no_text_is_no_jobs():
    assert (parse_sacct("\n"), parse_sprio("")) == ([], {})


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("12\n", "12"),
        ("12;leonardo\n", "12"),
        ("Budget left: 100 h\n13;leonardo\n", "13"),
        ("12\nthank you for flying Slurm\n", "12"),
    ],
)
def test_submitted(text: str, wanted: str):
    assert parse_submitted(text) == wanted


def test_no_job_id_is_an_error_that_says_what_to_do():
    with pytest.raises(OutputError, match="'Submitted, I think'") as caught:
        parse_submitted("Submitted, I think\n")
    assert "squeue --me" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("row", "job", "wanted"),
    [
        ("12", "12", True),
        ("12", "123", False),
        ("16_[0-3,7%2]", "16_2", True),
        ("16_[0-3,7%2]", "16_7", True),
        ("16_[0-3,7%2]", "16_5", False),
        ("16_[0-20:5]", "16_15", True),
        ("16_[0-20:5]", "16_3", False),
        ("16_[0-3,...]", "16_2", True),
        ("16_3", "16_3", True),
        ("16_3", "16_4", False),
        ("16_3", "16", True),
        ("17_3", "16", False),
    ],
)
def test_match_ids(row: str, job: str, wanted: bool):
    assert match_ids(row, {job, "1", "1_2"}) == ([job] if wanted else [])


def test_a_row_stands_for_all_of_its_tasks_and_their_array():
    wanted = [f"12_{task}" for task in range(12)] + ["12", "13_5"]
    assert match_ids("12_[5-9%2]", wanted) == ["12", "12_5", "12_6", "12_7", "12_8", "12_9"]


@pytest.mark.parametrize(
    ("text", "tasks"),
    [("[5-9]", {5, 6, 7, 8, 9}), ("[0-10:5,12%3]", {0, 5, 10, 12}), ("[3]", {3}), ("[1-2,...]", {1, 2}),
     ("[x-3]", set()), ("[0-4:0]", {0, 1, 2, 3, 4})],
)  # fmt: skip
def test_tasks(text: str, tasks: set[int]):
    assert parse_tasks(text) == tasks


@pytest.mark.parametrize(
    ("text", "wanted"), [("12", True), ("12_3", True), ("12+1", True), ("12 13", False), ("-1", False), ("", False)]
)
def test_is_job_id(text: str, wanted: bool):
    assert is_job_id(text) is wanted
