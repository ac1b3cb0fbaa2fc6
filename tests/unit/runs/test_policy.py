"""What follows an attempt, and what Slurm's states mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lora_jobs.runs import (
    EXIT_NO_CHECKPOINT,
    EXIT_SAVED,
    SLURM_STATES,
    Attempt,
    Decision,
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
    assert decide_after(code, attempts=attempts, resume=resume) == decision


def test_exit_codes_mean_nothing_else() -> None:
    assert (EXIT_SAVED, EXIT_NO_CHECKPOINT) == (85, 86)


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
