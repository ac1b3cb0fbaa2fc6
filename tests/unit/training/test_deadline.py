"""When a job stops by itself before its time is over."""

from __future__ import annotations

import pytest

from lora_jobs.training.deadline import FIRST_SAVE_SECONDS, LEAVING_SECONDS, Pace, find_end_time
from lora_jobs.training.launch import Launch

SLURM = Launch("slurm", "7", 0, 0, 0, 1, "n1")


@pytest.mark.parametrize(
    ("launch", "environment", "end"),
    [
        (SLURM, {"LORA_JOBS_END_TIME": "1763681530", "SLURM_JOB_END_TIME": "1"}, 1763681530.0),
        (SLURM, {"SLURM_JOB_END_TIME": "1763681530"}, 1763681530.0),
        (SLURM, {"SLURM_JOB_END_TIME": "UNLIMITED"}, None),
        (SLURM, {}, None),
        (Launch("local", "9", 0, 0, 0, 1, "n1", 100.0), {"SUBMITIT_LOCAL_TIMEOUT_S": "60"}, 160.0),
        (Launch("local", "9", 0, 0, 0, 1, "n1", 0.0), {"SUBMITIT_LOCAL_TIMEOUT_S": "60"}, None),
    ],
)
def test_the_end_time(launch: Launch, environment: dict[str, str], end: float | None) -> None:
    assert find_end_time(launch, environment) == end


def test_a_step_and_a_save_have_to_fit() -> None:
    pace = Pace(10_000.0, now=0.0)
    assert pace.needed_seconds() == 2 * FIRST_SAVE_SECONDS + LEAVING_SECONDS
    for seconds in (40.0, 100.0, 60.0):
        pace.add_step(seconds)
    pace.add_save(4.0)
    needed = 1.25 * 100.0 + 2 * 4.0 + LEAVING_SECONDS
    assert pace.needed_seconds() == needed
    assert not pace.is_last_step(10_000.0 - needed - 1)
    assert pace.is_last_step(10_000.0 - needed + 1)
    pace.add_save(30.0)
    pace.add_save(5.0)
    assert pace.save_seconds == 30.0


def test_only_recent_steps_count_and_no_end_means_no_last_step() -> None:
    pace = Pace(None, now=0.0)
    pace.add_step(5000.0)
    for _ in range(20):
        pace.add_step(1.0)
    assert pace.needed_seconds() == 1.25 + 2 * FIRST_SAVE_SECONDS
    assert not pace.is_last_step(1e12)
