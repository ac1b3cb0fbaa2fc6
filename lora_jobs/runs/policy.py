"""What is done after an attempt ended, and what each state of Slurm means for a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from lora_jobs.runs.attempts import SAVED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_jobs.runs.attempts import Attempt
    from lora_jobs.runs.causes import Cause
    from lora_jobs.spec import ResumeSpec

Decision = Literal["done", "requeue", "stop"]

FEWEST_KEPT = 2
"""So many of the newest committed checkpoints are never rotated away."""


def decide_after(cause: Cause, *, attempts: Sequence[Attempt], resume: ResumeSpec) -> tuple[Decision, str | None]:
    """What follows an attempt that ended this way, and why it stops where it could have gone on.

    `attempts` are those since the run was last started by hand, the one that ended as the last of them.
    """
    if cause.policy == "done":
        return "done", None
    if cause.policy != "resume":
        return "stop", None
    if not resume.auto:
        return "stop", "resume.auto is off"
    if len(attempts) >= resume.max_attempts:
        return "stop", f"resume.max_attempts: {len(attempts)} attempts since it was last started by hand"
    committed = attempts[-1].last_committed_step if attempts else None
    return ("stop", NO_PROGRESS) if is_stalled(attempts, committed) else ("requeue", None)


NO_PROGRESS = "two attempts in a row committed no new step"


def is_stalled(attempts: Sequence[Attempt], committed: int | None) -> bool:
    """Whether the last two attempts, however they ended, left the newest committed step where the first found it.

    A job whose start-up, or one step and its save, takes longer than its time would otherwise come back for ever.
    """
    return len(attempts) >= 2 and (committed or 0) <= attempts[-2].first_step


class JobState(Struct, frozen=True):
    """A state as Slurm spells it, or one of our own: whether the job is over, what it means, and what to do next."""

    name: str
    has_ended: bool
    meaning: str
    next_step: str


_RESUME = "lora-jobs resume continues from the newest good checkpoint"
_WAIT = "nothing to do: it goes on by itself"
_LOGS = "read lora-jobs logs, mend the cause, then lora-jobs resume"

# Source: squeue(1) and sacct(1), "JOB STATE CODES", Slurm 22.05 to 25.05.
SLURM_STATES: tuple[JobState, ...] = (
    JobState("PENDING", False, "waiting in the queue", _WAIT),
    JobState("CONFIGURING", False, "has its nodes, they are being made ready", _WAIT),
    JobState("RUNNING", False, "running", _WAIT),
    JobState("COMPLETING", False, "ending: the nodes are being cleaned up", _WAIT),
    JobState("SIGNALING", False, "being sent a signal", _WAIT),
    JobState("STAGE_OUT", False, "writing out its files", _WAIT),
    JobState("RESIZING", False, "changing its size", _WAIT),
    JobState("REQUEUED", False, "put back into the queue", _WAIT),
    JobState("REQUEUE_FED", False, "being requeued by the federation", _WAIT),
    JobState("SUSPENDED", False, "paused with its memory kept: another job runs there", _WAIT),
    JobState("STOPPED", False, "stopped by a signal, its CPUs kept", "scontrol resume JOB lets it go on"),
    JobState("REQUEUE_HOLD", False, "requeued and held", "scontrol release JOB lets it go on"),
    JobState("SPECIAL_EXIT", False, "requeued and held after a special exit", "scontrol release JOB lets it go on"),
    JobState("RESV_DEL_HOLD", False, "held: its reservation is gone", "scontrol release JOB, or submit without it"),
    JobState("COMPLETED", True, "ended with exit code 0", "lora-jobs status says where the adapter is"),
    JobState("CANCELLED", True, "cancelled, by you or an administrator", _RESUME),
    JobState("PREEMPTED", True, "had to make room for another job", _RESUME),
    JobState("TIMEOUT", True, "reached its time limit", f"{_RESUME}; resources.time may be too short"),
    JobState("DEADLINE", True, "could not end before its deadline", _RESUME),
    JobState("NODE_FAIL", True, "a node failed", _RESUME),
    JobState("BOOT_FAIL", True, "its nodes did not start", _RESUME),
    JobState("LAUNCH_FAILED", True, "could not be started on its nodes", _LOGS),
    JobState("RECONFIG_FAIL", True, "its nodes could not be set up as asked", _LOGS),
    JobState("FAILED", True, "ended with an error", _LOGS),
    JobState(
        "OUT_OF_MEMORY", True, "used more host memory than it had asked for", f"raise resources.mem, then {_RESUME}"
    ),
    JobState("REVOKED", True, "started on another cluster of the federation", "look for it there"),
)

# What our own records say where Slurm says nothing.
RECORDED_STATES: tuple[JobState, ...] = (
    JobState(SAVED, True, "saved on a signal and stopped", _RESUME),
    JobState("UNREACHABLE", False, "not known: Slurm does not answer", "ask again: lora-jobs status"),
    JobState("UNREADABLE", False, "not known: its directory is damaged", "look into the run's directory"),
    JobState("ELSEWHERE", False, "a local run of another machine", "ask on that machine: lora-jobs status"),
    JobState("KILLED", True, "ended without a word: killed, or its machine went down", _RESUME),
    JobState("NOT_SUBMITTED", True, "was never handed to a cluster", "lora-jobs resume submits it"),
    JobState("UNKNOWN", True, "the cluster no longer knows the job, and it left no record", _RESUME),
)
_STATES = {state.name: state for state in (*SLURM_STATES, *RECORDED_STATES)}


def explain_state(text: str) -> JobState | None:
    """The state in a word of squeue or sacct, such as `CANCELLED by 1001` or `CANCELLED+`; None for an unknown one."""
    words = text.split()
    return _STATES.get(words[0].rstrip("+").upper()) if words else None


def is_ended(text: str) -> bool:
    """Whether a job in this state is over; a state nobody knows counts as alive, so that nothing runs twice."""
    state = explain_state(text)
    return state is not None and state.has_ended
