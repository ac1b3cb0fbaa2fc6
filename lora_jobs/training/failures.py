"""What went wrong, in one line for the attempt's record and the log."""

from __future__ import annotations

import errno

from msgspec import Struct

from lora_jobs.errors import LoraJobsError

# A peer that is gone shows up as one of these in the ranks that were waiting for it.
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "NCCL", "TCPStore")


class Failure(Struct, frozen=True):
    """One line for people, the process's exit code, and whether a traceback helps (it is our or a library's fault)."""

    message: str
    exit_code: int
    traceback: bool

    @property
    def secondary(self) -> bool:
        """True where another rank's failure is the cause."""
        return self.message.startswith("another rank")


def classify_failure(error: BaseException) -> Failure:
    """Failure of an exception that ended the training."""
    if isinstance(error, LoraJobsError):
        hint = f" (next: {error.hint})" if error.hint else ""
        return Failure(f"{error.message}{hint}", error.exit_code, traceback=False)
    if isinstance(error, KeyboardInterrupt):
        return Failure("interrupted (SIGINT)", 130, traceback=False)
    kind, text = type(error).__name__, " ".join(str(error).split())
    if kind == "OutOfMemoryError" or "out of memory" in text.lower():
        return Failure(
            f"the GPU is out of memory: {text[:300]} (next: `lora-jobs check` on the spec names what to lower)",
            1,
            traceback=False,
        )
    if isinstance(error, MemoryError):
        return Failure("the host is out of memory (next: ask for more with resources.mem)", 1, traceback=False)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Failure(f"no space left for {error.filename or 'a checkpoint'}: {error.strerror}", 5, traceback=False)
    if isinstance(error, ModuleNotFoundError):
        return Failure(
            f"{error.name} is not installed in the job's environment (next: pip install 'lora-jobs[train]')",
            1,
            traceback=False,
        )
    if any(mark in text for mark in _LOST_PEER):
        return Failure(f"another rank is gone: {kind}: {text[:200]}", 1, traceback=True)
    return Failure(f"{kind}: {text[:300]}", 1, traceback=True)
