"""WHAT happened: run directories, attempts, and the policy for each state of Slurm."""

from lora_jobs.runs.attempts import (
    COMPLETED,
    FAILED,
    RUNNING,
    SAVED,
    Attempt,
    begin_attempt,
    end_attempt,
    find_attempt,
    load_attempts,
)
from lora_jobs.runs.durable import append_line, load_lines, write_atomic
from lora_jobs.runs.lease import hold_run
from lora_jobs.runs.metrics import append_metrics, latest_metrics, load_metrics, sync_metrics
from lora_jobs.runs.policy import (
    EXIT_NO_CHECKPOINT,
    EXIT_SAVED,
    SLURM_STATES,
    Decision,
    JobState,
    decide_after,
    explain_state,
    is_ended,
)
from lora_jobs.runs.store import Run, create_run, discard_run, find_run, find_runs_root, list_runs, next_run_id
from lora_jobs.runs.submissions import Backend, Submission, append_submission, load_submissions

__all__ = [
    "COMPLETED",
    "EXIT_NO_CHECKPOINT",
    "EXIT_SAVED",
    "FAILED",
    "RUNNING",
    "SAVED",
    "SLURM_STATES",
    "Attempt",
    "Backend",
    "Decision",
    "JobState",
    "Run",
    "Submission",
    "append_line",
    "append_metrics",
    "append_submission",
    "begin_attempt",
    "create_run",
    "decide_after",
    "discard_run",
    "end_attempt",
    "explain_state",
    "find_attempt",
    "find_run",
    "find_runs_root",
    "hold_run",
    "is_ended",
    "latest_metrics",
    "list_runs",
    "load_attempts",
    "load_lines",
    "load_metrics",
    "load_submissions",
    "next_run_id",
    "sync_metrics",
    "write_atomic",
]
