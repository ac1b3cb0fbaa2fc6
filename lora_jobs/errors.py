"""The errors that reach a user, each with its exit code and the next thing to try."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class Problem(NamedTuple):
    """One thing wrong in an input: where it stands (dotted key, 1-based line) and what it is.

    Of the standard library: a job's environment that lacks packages can still say so.
    """

    path: str
    message: str
    line: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "line": self.line, "message": self.message}


class LoraJobsError(Exception):
    """Base of every error that is shown to a user as one message."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def to_text(self) -> str:
        """The message and the next step, as programs beside the command line print them."""
        return f"lora-jobs: {self.message}" + (f"\nnext: {self.hint}" if self.hint else "")


class SpecError(LoraJobsError):
    """A bad spec or bad usage; `problems` holds everything that is wrong, not only the first."""

    exit_code = 2

    def __init__(self, message: str, *, problems: Sequence[Problem] = (), hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.problems = tuple(problems)


class DoesNotFitError(LoraJobsError):
    """The job needs more memory than its GPU has; of a sweep, `problems` names the runs that do."""

    exit_code = 3

    def __init__(
        self,
        message: str,
        *,
        estimate: Any = None,
        gpu: Any = None,
        problems: Sequence[Problem] = (),
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.estimate = estimate
        self.gpu = gpu
        self.problems = tuple(problems)


class ClusterError(LoraJobsError):
    """Slurm, or the machine that stands in for it, did not do what was asked."""

    exit_code = 4


class CommandError(ClusterError):
    """A command could not be run or failed; its own words are kept."""

    def __init__(
        self,
        message: str,
        *,
        command: Sequence[str] = (),
        returncode: int | None = None,
        stderr: str = "",
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.command = tuple(command)
        self.returncode = returncode
        self.stderr = stderr


class OutputError(ClusterError):
    """A command answered something that could not be read; the line is quoted."""

    def __init__(self, message: str, *, line: str = "", hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.line = line


class SubmissionError(ClusterError):
    """The job was refused; nothing was queued."""


class RunError(LoraJobsError):
    """A run, or a checkpoint of it, is missing or not usable."""

    exit_code = 5


class RunNotFoundError(RunError):
    """No run has this id, name or directory."""


class RunExistsError(RunError):
    """Another submission took this run id first; the next free one is to be tried."""


class CheckpointError(RunError):
    """A checkpoint is damaged; says which file and what is wrong with it."""

    def __init__(self, message: str, *, path: Path | None = None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.path = path
