"""Why an attempt ended and what that asks for: one table over what the log says, the exit code and Slurm's state."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct

from lora_jobs.runs.attempts import COMPLETED, SAVED

if TYPE_CHECKING:
    from pathlib import Path

EXIT_SAVED = 85
"""The job saved on a signal and wants to be requeued; above sysexits.h, below the 128+N of signals."""

EXIT_NO_CHECKPOINT = 86
"""Checkpoints exist and none of them is good: training from the start would silently lose them."""

EXIT_HANG = 87
"""No rank got any further for longer than a step, a save or an evaluation can take."""

EXIT_NO_PROGRESS = 88
"""Two attempts in a row committed nothing: a third would end the same way."""

EXIT_DISK_FULL = 89
"""There is no room for a checkpoint: two saves in a row could not be made."""

LOG_TAIL_BYTES = 64 * 1024

Policy = Literal["done", "resume", "ask", "refuse"]
"""resume: goes on by itself. ask: `resume` by hand goes on. refuse: `resume` wants a changed spec, or --force."""


class Cause(Struct, frozen=True):
    """One way to end. `log` is looked for in the log and the recorded reason, `codes` and `states` where it is not."""

    name: str
    meaning: str
    policy: Policy
    advice: str
    log: str = ""
    codes: tuple[int, ...] = ()
    states: tuple[str, ...] = ()
    blames_node: bool = False


class Diagnosis(Struct, frozen=True):
    """The cause of an end; `evidence` is the line of the log that says so, or the last words of a Python error."""

    cause: Cause
    evidence: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "cause": self.cause.name,
            "meaning": self.cause.meaning,
            "policy": self.cause.policy,
            "advice": self.cause.advice,
            "evidence": self.evidence,
        }


_RESUME = "lora-jobs resume continues from the newest good checkpoint"

# The first row that matches counts, so what is certain stands before what is only a consequence of it: the rank that
# ran out of memory before the ranks that lost it. Wording of torch 2.13, NCCL 2.2x, Slurm 20.11 to 25.05.
CAUSES: tuple[Cause, ...] = (
    Cause("finished", "trained to its end", "done", "nothing to do", codes=(0,), states=(COMPLETED,)),
    Cause("saved", "saved on a signal and stopped", "resume", _RESUME, codes=(EXIT_SAVED,), states=(SAVED,)),
    Cause(
        "no_checkpoint",
        "none of its checkpoints is good",
        "refuse",
        "lora-jobs verify says what is wrong; resume --from-scratch starts over",
        codes=(EXIT_NO_CHECKPOINT,),
    ),
    Cause(
        "no_progress",
        "two attempts in a row committed no new step",
        "ask",
        "raise resources.time, or lower training.save_steps, so that a step and a save fit; then lora-jobs resume",
        codes=(EXIT_NO_PROGRESS,),
    ),
    Cause(
        "stale_choice",
        "another job committed a checkpoint after this one had chosen",
        "resume",
        _RESUME,
        log=r"was committed by another job after this one had chosen",
    ),
    Cause(
        "second_writer",
        "another job was training the same run",
        "ask",
        "lora-jobs status says which; lora-jobs resume once it has ended",
        log=r"is being trained by job|another job has taken over",
    ),
    Cause(
        "gpu_memory",
        "the GPU ran out of memory",
        "refuse",
        "lora-jobs check names what to lower; then lora-jobs resume --set KEY=VALUE",
        log=r"CUDA out of memory|torch\.(?:cuda\.)?OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED|GPU is out of memory",
    ),
    Cause(
        "host_memory",
        "the host memory that the job asked for was used up",
        "refuse",
        "lora-jobs resume --set resources.mem=SIZE with more than before",
        log=r"oom.kill event|OOM Killed|host is out of memory|DefaultCPUAllocator: (?:can't|not enough)|^MemoryError",
        states=("OUT_OF_MEMORY",),
    ),
    Cause(
        "disk_full",
        "the disk or the quota is full",
        "ask",
        "free some space, then lora-jobs resume",
        log=r"No space left on device|Disk quota exceeded|no space left for|Errno 28\b|Errno 122\b",
        codes=(EXIT_DISK_FULL,),
    ),
    Cause(
        "gpu_broken",
        "a GPU or its driver failed",
        "resume",
        "the node is left out of the next attempt; tell the cluster's support",
        log=r"uncorrectable ECC error|GPU has fallen off the bus|Unable to determine the device handle|"
        r"No CUDA GPUs are available|shows no GPU to torch|CUDA driver initialization failed|"
        r"CUDA error: (?:unspecified launch failure|unknown error|system not yet initialized|all CUDA-capable devices)|"
        r"CUDA error: device not ready|NVML_ERROR|forward compatibility was attempted",
        blames_node=True,
    ),
    Cause(
        "nccl",
        "the GPUs lost each other (NCCL)",
        "resume",
        "the node that said so first is left out of the next attempt",
        log=r"NCCL error in|ncclSystemError|ncclInternalError|ncclUnhandledCudaError|ncclRemoteError|"
        r"Watchdog caught collective operation timeout",
        blames_node=True,
    ),
    Cause(
        "not_finite",
        "the loss or its gradient is no number any more",
        "refuse",
        "lora-jobs resume --set training.learning_rate=... --allow-drift training.learning_rate, or bf16 for fp16",
        log=r"the (?:loss|gradient norm) is (?:nan|-?inf) at step",
    ),
    Cause(
        "packages",
        "the job's environment lacks a package",
        "ask",
        "install it into the job's environment (lora-jobs doctor looks), then lora-jobs resume",
        log=r"is not installed in the job's environment|^ModuleNotFoundError: ",
    ),
    Cause(
        "hang",
        "no rank got any further",
        "resume",
        "the stacks of all ranks are in lora-jobs logs; resume.hang_seconds is the patience",
        log=r"^Timeout \(\d+:\d\d:\d\d|no progress for \d+ s",
        codes=(EXIT_HANG,),
    ),
    Cause(
        "time_limit",
        "reached its time limit",
        "ask",
        f"{_RESUME}; raise resume.signal_seconds if it was not saved in time",
        log=r"DUE TO TIME LIMIT",
        states=("TIMEOUT", "DEADLINE"),
    ),
    Cause(
        "preempted",
        "had to make room for another job",
        "ask",
        _RESUME,
        log=r"DUE TO PREEMPTION",
        states=("PREEMPTED",),
    ),
    Cause(
        "node_failure",
        "a node failed",
        "ask",
        _RESUME,
        log=r"DUE TO NODE FAILURE|Node failure on|Communication connection failure",
        states=("NODE_FAIL", "BOOT_FAIL"),
    ),
    Cause(
        "cancelled",
        "cancelled, by you or an administrator",
        "ask",
        _RESUME,
        log=r"\*\*\* (?:JOB|STEP) [\d.+_]+ ON \S+ CANCELLED AT \S+ \*\*\*",
        codes=(130,),
        states=("CANCELLED",),
    ),
    Cause(
        "port_taken",
        "the port where the ranks meet was taken",
        "resume",
        "the next attempt meets at another port",
        log=r"EADDRINUSE|address already in use",
    ),
    Cause(
        "lost_rank",
        "a process of the training vanished",
        "resume",
        "the log of the attempt says which was the first",
        log=r"another rank is gone|Connection (?:closed|reset) by peer|rank 0 (?:began no attempt|named no port)",
    ),
    Cause(
        "not_started",
        "could not be started on its nodes",
        "ask",
        "read lora-jobs logs, then lora-jobs resume",
        states=("LAUNCH_FAILED", "RECONFIG_FAIL"),
    ),
    Cause(
        "python_error",
        "a Python error ended it",
        "ask",
        "read lora-jobs logs, mend the cause, then lora-jobs resume",
        log=r"^Traceback \(most recent call last\)",
    ),
    Cause("killed", "killed without a word", "ask", _RESUME, codes=(137, 143), states=("KILLED", "UNKNOWN")),
    Cause("failed", "ended with an error", "ask", "read lora-jobs logs, mend the cause, then lora-jobs resume"),
)
_BY_NAME = {cause.name: cause for cause in CAUSES}
_LAST_WORDS = r"^(?:\[rank\d+\]: ?)?([A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)\b.*)$"


def find_cause(name: str | None) -> Cause | None:
    """The row of that name."""
    return _BY_NAME.get(name or "")


def classify_end(*, log: str = "", exit_code: int | None = None, state: str | None = None) -> Diagnosis:
    """The first row of the table that fits. Our own exit codes are certain; then the log; then Slurm's word.

    `log` is the end of the attempt's log with the recorded reason; `state` as Slurm spells it.
    """
    ours = range(EXIT_SAVED, EXIT_DISK_FULL + 1)
    if exit_code == 0 or exit_code in ours:
        return Diagnosis(next(cause for cause in CAUSES if exit_code in cause.codes), _find_last_words(log))
    word = state.split()[0].rstrip("+").upper() if state and state.split() else ""
    if word in (COMPLETED, SAVED):
        return Diagnosis(next(cause for cause in CAUSES if word in cause.states))
    for cause in CAUSES:
        if cause.log and (match := re.search(cause.log, log, re.MULTILINE)) is not None:
            evidence = _find_last_words(log) if cause.name == "python_error" else _line_of(log, match.start())
            return Diagnosis(cause, evidence)
        if (word and word in cause.states) or (exit_code is not None and exit_code in cause.codes):
            return Diagnosis(cause, _find_last_words(log))
    return Diagnosis(_BY_NAME["failed"], _find_last_words(log))


def read_tail(paths: list[Path], *, most: int = LOG_TAIL_BYTES) -> str:
    """The ends of some logs, one after another; a file that is not there is left out."""
    parts = []
    for path in paths:
        try:
            with path.open("rb") as stream:
                stream.seek(max(0, stream.seek(0, 2) - most))
                parts.append(stream.read(most).decode("utf-8", "replace"))
        except OSError:
            continue
    return "\n".join(parts)


def _line_of(text: str, place: int) -> str:
    start = text.rfind("\n", 0, place) + 1
    end = text.find("\n", place)
    return " ".join(text[start : end if end >= 0 else None].split())[:300]


def _find_last_words(text: str) -> str | None:
    found = re.findall(_LAST_WORDS, text, re.MULTILINE)
    return " ".join(str(found[-1]).split())[:300] if found else None
