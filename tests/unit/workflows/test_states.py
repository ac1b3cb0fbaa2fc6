"""The state of a run for every combination of Slurm's answer, our record and the adapter that has come up."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from lora_jobs.cluster.parsers import SlurmJob, read_queued_job
from lora_jobs.runs import Attempt, Submission, is_ended
from lora_jobs.workflows.states import BROKEN_ADAPTER, Evidence, resolve_state

SLURM = Submission("7", "slurm", 0.0, "login01")
LOCAL = Submission("7", "local", 0.0, "login01")


def attempt(state: str = "RUNNING", *, reason: str | None = None, job_id: str = "7", backend: str = "slurm") -> Attempt:
    ended = None if state == "RUNNING" else 9.0
    return Attempt(
        number=1, job_id=job_id, restart_count=0, backend=backend, state=state, host="node1", started_at=1.0,
        ended_at=ended, resume_from=None, first_step=0, last_committed_step=None, exit_code=None, reason=reason,
    )  # fmt: skip


def job(state: str, reason: str | None = None) -> SlurmJob:
    row = "7|PENDING|Priority|boost|me|p|normal|10|2026-11-20T10:00:00|N/A|0:00|1:00:00|1|(null)||(null)|(null)|run-1"
    return replace(read_queued_job(row.split("|")), state=state, reason=reason)


SAVED = attempt("SAVED", reason="saved after SIGUSR2")
FAILED = attempt("FAILED", reason="the loss is nan at step 3")
DONE = attempt("COMPLETED", reason="finished")
LOCAL_OPEN = attempt(backend="local")

CASES = {
    "waits": (Evidence(SLURM, None, job("PENDING", "Priority")), ("PENDING", "Priority")),
    "runs": (Evidence(SLURM, attempt(), job("RUNNING")), ("RUNNING", None)),
    "runs on after its adapter is there": (
        Evidence(SLURM, attempt(), job("RUNNING"), is_finished=True), ("RUNNING", None)),
    "waits again after a saved attempt": (
        Evidence(SLURM, SAVED, job("PENDING", "BeginTime")), ("PENDING", "BeginTime")),
    "done": (Evidence(SLURM, DONE, job("COMPLETED"), is_finished=True), ("COMPLETED", None)),
    "done, cancelled too late": (Evidence(SLURM, DONE, job("CANCELLED"), is_finished=True), ("COMPLETED", None)),
    "done without adapter": (Evidence(SLURM, DONE, job("COMPLETED")), ("FAILED", BROKEN_ADAPTER)),
    "failed, and we know why": (
        Evidence(SLURM, FAILED, job("FAILED", "NonZeroExitCode")), ("FAILED", "the loss is nan at step 3")),
    "saved and not requeued": (
        Evidence(SLURM, SAVED, job("FAILED", "NonZeroExitCode")), ("SAVED", "saved after SIGUSR2")),
    "cancelled": (Evidence(SLURM, SAVED, job("CANCELLED")), ("CANCELLED", "saved after SIGUSR2")),
    "time limit": (Evidence(SLURM, attempt(), job("TIMEOUT", "TimeLimit")), ("TIMEOUT", "TimeLimit")),
    "failed after it had waited out a requeue": (Evidence(SLURM, None, job("FAILED", "BeginTime")), ("FAILED", None)),
    "failed, for a reason of a later Slurm": (
        Evidence(SLURM, None, job("FAILED", "NodeOnFire")), ("FAILED", "NodeOnFire")),
    "Slurm does not answer": (
        Evidence(SLURM, attempt(), queue_answered=False),
        ("UNREACHABLE", "Slurm does not answer: the job may be waiting or running")),
    "Slurm does not answer, but it is done": (
        Evidence(SLURM, DONE, queue_answered=False, is_finished=True), ("COMPLETED", None)),
    "Slurm has forgotten a job that never ended": (Evidence(SLURM, attempt()), ("KILLED", None)),
    "Slurm has forgotten a saved job": (Evidence(SLURM, SAVED), ("SAVED", "saved after SIGUSR2")),
    "Slurm has forgotten a job that never began": (
        Evidence(SLURM, attempt("SAVED", job_id="6")), ("UNKNOWN", "Slurm no longer knows the job")),
    "never submitted": (Evidence(None, None), ("NOT_SUBMITTED", None)),
    "local, runs": (Evidence(LOCAL, LOCAL_OPEN, has_processes=True), ("RUNNING", None)),
    "local, saves its adapter": (
        Evidence(LOCAL, LOCAL_OPEN, has_processes=True, is_finished=True), ("RUNNING", None)),
    "local, killed": (Evidence(LOCAL, LOCAL_OPEN), ("KILLED", None)),
    "local, on another login node": (
        Evidence(LOCAL, LOCAL_OPEN, is_here=False), ("ELSEWHERE", "started on login01: ask there")),
    "local, on another login node, ended": (
        Evidence(LOCAL, attempt("SAVED", reason="saved after SIGTERM", backend="local"), is_here=False),
        ("SAVED", "saved after SIGTERM")),
    "local, died at once": (Evidence(LOCAL, None), ("FAILED", "ended before training began")),
    "local, submission not recorded": (Evidence(None, LOCAL_OPEN, has_processes=True), ("RUNNING", None)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_state(case: str) -> None:
    evidence, wanted = CASES[case]
    assert resolve_state(evidence) == wanted


def test_what_may_be_alive_never_counts_as_ended() -> None:
    alive = {"waits", "runs", "runs on after its adapter is there", "waits again after a saved attempt",
             "Slurm does not answer", "local, runs", "local, saves its adapter", "local, on another login node",
             "local, submission not recorded"}  # fmt: skip
    assert {case for case, (_, (state, _)) in CASES.items() if not is_ended(state)} == alive
