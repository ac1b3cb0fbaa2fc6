"""Which steps a run has committed, by its own records: where no such checkpoint is left, work was lost."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from lora_jobs.errors import RunError
from lora_jobs.runs.attempts import load_attempts
from lora_jobs.runs.durable import explain_errors
from lora_jobs.runs.metrics import load_metrics

if TYPE_CHECKING:
    from lora_jobs.runs.store import Run

COMMITTED_EVENT = "committed"
STARTED_OVER_FILE = "started_over.json"
"""Written when somebody starts a run over: what was committed until then is no loss any more."""


def list_committed_steps(run: Run) -> frozenset[int]:
    """The steps of all commits since the run was last started over. Raises RunError.

    An attempt that went on from a step has dealt with what was newer: it was set aside, or never finished.
    """
    before = load_started_over(run)
    notes = [row for row in load_metrics(run) if row.get("event") == COMMITTED_EVENT]
    steps: set[int] = set()
    for attempt in load_attempts(run):
        if attempt.number <= before:
            continue
        if attempt.first_step > 0:
            steps = {step for step in steps if step < attempt.first_step} | {attempt.first_step}
        steps |= {row["step"] for row in notes if row.get("attempt") == attempt.number and type(row.get("step")) is int}
        steps |= {attempt.last_committed_step} if attempt.last_committed_step else set()
    return frozenset(steps)


def render_started_over(run: Run) -> str:
    """The content of STARTED_OVER_FILE: the last attempt until now."""
    number = max((attempt.number for attempt in load_attempts(run)), default=0)
    return json.dumps({"after_attempt": number}) + "\n"


def load_started_over(run: Run) -> int:
    """The number of the last attempt before the run was started over; 0 where it never was, or nobody can tell."""
    path = run.directory / STARTED_OVER_FILE
    try:
        with explain_errors("read", path):
            values = json.loads(path.read_bytes())
    except RunError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return 0
        raise
    except ValueError:
        return 0
    number = values.get("after_attempt") if isinstance(values, dict) else None
    return number if type(number) is int else 0
