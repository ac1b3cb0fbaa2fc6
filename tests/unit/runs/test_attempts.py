"""Attempts and submissions: one line each, once each, readable after any crash and by any version."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from lora_jobs.errors import RunError
from lora_jobs.runs import (
    Attempt,
    Run,
    Submission,
    append_submission,
    begin_attempt,
    create_run,
    end_attempt,
    find_attempt,
    load_attempts,
    load_submissions,
)

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return create_run(tmp_path / "runs", "a-1", {"spec.yaml": "x"})


def begin(
    run: Run, job_id: str = "12", restart_count: int = 0, resume_from: str | None = None, step: int = 0
) -> Attempt:
    return begin_attempt(
        run,
        job_id=job_id,
        restart_count=restart_count,
        backend="slurm",
        host="lrdn0001",
        resume_from=resume_from,
        first_step=step,
    )


def end(run: Run, job_id: str = "12", restart_count: int = 0, *, code: int = 85) -> Attempt:
    return end_attempt(
        run,
        job_id=job_id,
        restart_count=restart_count,
        exit_code=code,
        state="SAVED",
        reason="signal USR2",
        last_committed_step=20,
    )


def test_a_start_that_is_refused_is_over_from_its_first_line(run: Run) -> None:
    """The other ranks look for the line: one of a running attempt would have them wait for a rank that has left."""
    options = {"job_id": "12", "restart_count": 0, "backend": "local", "host": "here", "resume_from": None}
    attempt = begin_attempt(run, **options, first_step=0, refused="no good checkpoint")
    assert (attempt.has_ended, attempt.state, attempt.reason) == (True, "FAILED", "no good checkpoint")
    assert load_attempts(run) == [attempt]


def test_an_attempt_begins_and_ends(run: Run) -> None:
    assert load_attempts(run) == []
    before = time.time()
    begun = begin(run)
    assert before <= begun.started_at <= time.time()
    wanted = Attempt(1, "12", 0, "slurm", "RUNNING", "lrdn0001", begun.started_at)
    assert load_attempts(run) == [begun] == [wanted]
    assert begun.has_ended is False
    ended = end(run)
    assert ended == replace(
        wanted, ended_at=ended.ended_at, exit_code=85, state="SAVED", reason="signal USR2", last_committed_step=20
    )
    assert ended.has_ended is True
    assert load_attempts(run) == [ended]


def test_the_same_job_and_restart_begin_once(run: Run) -> None:
    first = begin(run)
    assert begin(run, resume_from="checkpoint-99", step=99) == first
    second = begin(run, restart_count=1, resume_from="checkpoint-20", step=20)
    third = begin(run, job_id="13")
    assert [attempt.number for attempt in (first, second, third)] == [1, 2, 3]
    assert load_attempts(run) == [first, second, third]
    assert find_attempt(run, job_id="12", restart_count=1) == second
    assert find_attempt(run, job_id="14", restart_count=0) is None


def test_only_its_own_attempt_is_ended(run: Run) -> None:
    first = begin(run)
    begin(run, restart_count=1)
    ended = end(run, restart_count=1)
    assert load_attempts(run) == [first, ended]


def test_what_never_began_cannot_end(run: Run) -> None:
    with pytest.raises(RunError, match=r"no attempt of job 12 \(restart 0\) has begun"):
        end(run)
    assert not run.attempts_path.exists()


def test_a_torn_begin_is_begun_again(run: Run) -> None:
    begin(run)
    begin(run, job_id="13")
    torn = run.attempts_path.read_bytes()[:-40]
    run.attempts_path.write_bytes(torn)
    assert [attempt.job_id for attempt in load_attempts(run)] == ["12"]
    assert begin(run, job_id="13").number == 2
    assert [attempt.job_id for attempt in load_attempts(run)] == ["12", "13"]


def test_records_of_other_versions(run: Run) -> None:
    begin(run)
    record = json.loads(run.attempts_path.read_text())
    lines = [
        {**record, "job_id": "new", "colour": "green"},
        {key: value for key, value in record.items() if key not in {"reason", "exit_code"}} | {"job_id": "old"},
        {**record, "number": "3"},
        {**record, "number": True},
        {**record, "job_id": None},
        {"job_id": "12"},
    ]
    run.attempts_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [attempt.job_id for attempt in load_attempts(run)] == ["new", "old"]


def test_submissions_come_back(run: Run) -> None:
    assert load_submissions(run) == []
    submissions = [
        Submission("12", "slurm", 1.5, "login01"),
        Submission("4711", "local", 2.5, "here", pid_created_at=2.25),
    ]
    for submission in submissions:
        append_submission(run, submission)
    assert load_submissions(run) == submissions
    with run.submissions_path.open("a") as stream:
        stream.write('{"job_id": "13", "backend": "slu')
    assert load_submissions(run) == submissions
