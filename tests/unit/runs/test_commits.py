"""Which steps a run has committed, read from its records alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lora_jobs.runs import (
    STARTED_OVER_FILE,
    Run,
    append_metrics,
    begin_attempt,
    create_run,
    end_attempt,
    list_committed_steps,
    render_started_over,
)

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return create_run(tmp_path, "tiny-1", {"spec.yaml": "name: tiny\n"})


def start(run: Run, first: int, *committed: int, last: int | None = None, ended: bool = True) -> None:
    """An attempt with notes of these commits; its end says `last`."""
    source = f"checkpoint-{first}" if first else None
    job = f"{first}-{len(run.attempts_path.read_text().splitlines()) if run.attempts_path.exists() else 0}"
    attempt = begin_attempt(
        run, job_id=job, restart_count=0, backend="slurm", host="n1", resume_from=source, first_step=first
    )
    for step in committed:
        append_metrics(run, {"kind": "note", "event": "committed", "attempt": attempt.number, "step": step})
    if ended:
        end_attempt(run, job_id=job, restart_count=0, exit_code=1, state="FAILED", reason="x", last_committed_step=last)


def test_nothing_is_known_of_a_run_that_committed_nothing(run: Run) -> None:
    assert list_committed_steps(run) == frozenset()
    start(run, 0)
    assert list_committed_steps(run) == frozenset()


def test_a_note_an_end_and_a_start_each_tell_of_a_commit(run: Run) -> None:
    start(run, 0, 4, 8, ended=False)
    assert list_committed_steps(run) == {4, 8}
    start(run, 8, last=12)
    assert list_committed_steps(run) == {4, 8, 12}


def test_a_start_from_an_older_step_has_dealt_with_what_was_newer(run: Run) -> None:
    start(run, 0, 4, 8, 12, last=12)
    start(run, 8)
    assert list_committed_steps(run) == {4, 8}


def test_a_start_that_was_refused_forgets_nothing(run: Run) -> None:
    start(run, 0, 4, last=4)
    start(run, 0)
    assert list_committed_steps(run) == {4}


def test_starting_over_by_hand_does(run: Run) -> None:
    start(run, 0, 4, last=4)
    (run.directory / STARTED_OVER_FILE).write_text(render_started_over(run))
    assert list_committed_steps(run) == frozenset()
    start(run, 0, 2, ended=False)
    assert list_committed_steps(run) == {2}


@pytest.mark.parametrize("text", ["", "[]", '{"after_attempt": "1"}'])
def test_a_damaged_record_of_starting_over_hides_no_commit(run: Run, text: str) -> None:
    start(run, 0, 4, last=4)
    (run.directory / STARTED_OVER_FILE).write_text(text)
    assert list_committed_steps(run) == {4}
