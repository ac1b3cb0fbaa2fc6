"""What follows an attempt, and what Slurm's states mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lora_jobs.runs import (
    EXIT_HANG,
    EXIT_NO_CHECKPOINT,
    EXIT_NO_PROGRESS,
    EXIT_SAVED,
    NO_PROGRESS,
    SLURM_STATES,
    Attempt,
    Decision,
    classify_end,
    decide_after,
    explain_state,
    is_ended,
)
from lora_jobs.spec import ResumeSpec

if TYPE_CHECKING:
    from collections.abc import Sequence


def saved(*steps: tuple[int, int | None]) -> list[Attempt]:
    """Attempts that saved on a signal: (first step, last committed step)."""
    return [
        Attempt(
            number=number,
            job_id="1",
            restart_count=number - 1,
            backend="slurm",
            state="SAVED",
            host="n1",
            started_at=0.0,
            ended_at=1.0,
            first_step=first,
            last_committed_step=last,
        )
        for number, (first, last) in enumerate(steps, start=1)
    ]


@pytest.mark.parametrize(
    ("code", "attempts", "resume", "decision"),
    [
        (EXIT_HANG, saved((0, 5)), ResumeSpec(), "requeue"),
        (EXIT_HANG, saved((0, 0), (0, 0)), ResumeSpec(), "stop"),
        (EXIT_NO_PROGRESS, saved((0, 5)), ResumeSpec(), "stop"),
        (0, saved((0, 5)), ResumeSpec(), "done"),
        (EXIT_SAVED, saved((0, 5)), ResumeSpec(), "requeue"),
        (EXIT_SAVED, saved((0, 5)), ResumeSpec(auto=False), "stop"),
        (EXIT_SAVED, saved((0, 5), (5, 9)), ResumeSpec(max_attempts=3), "requeue"),
        (EXIT_SAVED, saved((0, 5), (5, 9)), ResumeSpec(max_attempts=2), "stop"),
        (EXIT_SAVED, saved((0, 5), (5, 5)), ResumeSpec(), "requeue"),
        (EXIT_SAVED, saved((0, 5), (5, 5), (5, 5)), ResumeSpec(), "stop"),
        (EXIT_SAVED, saved((0, 5), (5, 5), (5, 6)), ResumeSpec(), "requeue"),
        (EXIT_SAVED, saved((0, None), (0, None)), ResumeSpec(), "stop"),
        (EXIT_SAVED, [], ResumeSpec(), "requeue"),
        (EXIT_NO_CHECKPOINT, saved((0, 5)), ResumeSpec(), "stop"),
        *[(code, saved((0, 5)), ResumeSpec(), "stop") for code in (1, 2, 5, 127, 130, 137, 139, 140, 143)],
    ],
)
def test_decisions(code: int, attempts: Sequence[Attempt], resume: ResumeSpec, decision: Decision) -> None:
    cause = classify_end(exit_code=code).cause
    assert decide_after(cause, attempts=attempts, resume=resume)[0] == decision


def test_a_stop_that_could_have_gone_on_says_why() -> None:
    cause = classify_end(exit_code=EXIT_SAVED).cause
    assert decide_after(cause, attempts=saved((0, 0), (0, 0)), resume=ResumeSpec())[1] == NO_PROGRESS
    assert "max_attempts" in str(decide_after(cause, attempts=saved((0, 9)), resume=ResumeSpec(max_attempts=1))[1])


def test_exit_codes_mean_nothing_else() -> None:
    assert (EXIT_SAVED, EXIT_NO_CHECKPOINT, EXIT_HANG, EXIT_NO_PROGRESS) == (85, 86, 87, 88)


@pytest.mark.parametrize(
    ("text", "name", "ended"),
    [
        ("PENDING", "PENDING", False),
        ("RUNNING", "RUNNING", False),
        ("COMPLETING", "COMPLETING", False),
        ("REQUEUED", "REQUEUED", False),
        ("COMPLETED", "COMPLETED", True),
        ("CANCELLED by 1001", "CANCELLED", True),
        ("CANCELLED+", "CANCELLED", True),
        ("OUT_OF_ME+", None, False),
        ("OUT_OF_MEMORY", "OUT_OF_MEMORY", True),
        ("NODE_FAIL", "NODE_FAIL", True),
        ("timeout", "TIMEOUT", True),
        ("PREEMPTED", "PREEMPTED", True),
        ("SAVED", "SAVED", True),
        ("KILLED", "KILLED", True),
        ("NOT_SUBMITTED", "NOT_SUBMITTED", True),
        ("BRAND_NEW_STATE", None, False),
        ("", None, False),
    ],
)
def test_states(text: str, name: str | None, ended: bool) -> None:
    state = explain_state(text)
    assert (None if state is None else state.name) == name
    assert is_ended(text) is ended


def test_every_state_says_something() -> None:
    assert len({state.name for state in SLURM_STATES}) == len(SLURM_STATES)
    assert all(state.meaning and state.next_step for state in SLURM_STATES)
