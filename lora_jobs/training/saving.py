"""A save by all ranks, or by none: what fails in one is kept until all can hear of it, and no rank waits for ever."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from safetensors import SafetensorError

from lora_jobs.checkpoints import FileEntry, flush_part, write_manifest
from lora_jobs.errors import LoraJobsError, RunError
from lora_jobs.runs import EXIT_DISK_FULL
from lora_jobs.training.record import NO_SPACE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from lora_jobs.training.agreement import Agreement

# What torch's and safetensors' writers say of a full disk: they have no errno. A short write is all torch can see.
_NO_SPACE_WORDS = ("no space left", "quota exceeded", "file too large", "pytorchstreamwriter failed", "unexpected pos")

WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


class DiskFullError(RunError):
    """No room for a checkpoint: nothing that is trained now could be kept."""

    exit_code = EXIT_DISK_FULL


class SaveFailure(Struct, frozen=True):
    """Why one rank could not do its part of a save, and whether it was for want of room."""

    rank: int
    reason: str
    no_space: bool

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.reason}"

    def as_error(self, what: str) -> RunError:
        """The error that every rank raises: exit code 89 for a full disk, else 5."""
        if self.no_space:
            hint = "free some space (du -sh on the run's checkpoints), or raise the quota; then lora-jobs resume"
            return DiskFullError(f"{what}: no room: {self}", hint=hint)
        return RunError(f"{what}: {self}", hint="look at the file system, then lora-jobs resume")


class SaveErrors:
    """What went wrong in this rank since the last commit. The first counts; what follows are its consequences."""

    def __init__(self) -> None:
        self.first: Exception | None = None

    @contextlib.contextmanager
    def kept(self, kinds: tuple[type[Exception], ...] = WRITE_ERRORS) -> Iterator[None]:
        """Keep what writing a file can raise. Around collectives only OSError: a lost peer is a RuntimeError."""
        try:
            yield
        except kinds as error:
            self.first = self.first or error

    def take(self) -> Exception | None:
        """The first error, which is forgotten by this."""
        error, self.first = self.first, None
        return error


def explain_failure(rank: int, error: Exception) -> SaveFailure:
    """SaveFailure of what a rank's writing or flushing raised."""
    text = error.message if isinstance(error, LoraJobsError) else " ".join(str(error).split())
    cause = error if isinstance(error, OSError) else error.__cause__
    if isinstance(cause, OSError):
        no_space = cause.errno in NO_SPACE
    else:
        no_space = any(words in text.lower() for words in _NO_SPACE_WORDS)
    return SaveFailure(rank, text[:300], no_space)


def guard_engine(engine: Any, errors: SaveErrors) -> None:
    """Have a DeepSpeed engine keep what its writing raises: it has barriers after it, where the other ranks wait.

    Its recovery script is left out: an executable that a checkpoint does not need. Twice is as once.
    """
    writer = engine.checkpoint_engine
    if "save" in vars(writer):
        return

    def guarded(call: Any) -> Any:
        def keep(*args: Any, **options: Any) -> None:
            with errors.kept():
                call(*args, **options)

        return keep

    writer.save, writer.makedirs = guarded(writer.save), guarded(writer.makedirs)
    engine._copy_recovery_script = lambda _path: None  # DeepSpeed has no switch for it


def commit_together(
    directory: Path,
    agreement: Agreement,
    errors: SaveErrors,
    *,
    step: int,
    rank: int,
    world_size: int,
    metadata: Mapping[str, Any],
) -> SaveFailure | None:
    """Each rank flushes and hashes its own files, rank 0 writes the manifest; all return the same: None, or why not."""
    files: dict[str, FileEntry] = {}
    error = errors.take()
    if error is None:
        try:
            files = flush_part(directory, rank=rank, world_size=world_size)
        except (OSError, LoraJobsError) as found:
            error = found
    parts = agreement.gather((files, None if error is None else explain_failure(rank, error)))
    if failures := [failure for _, failure in parts if failure is not None]:
        # One full disk also leaves others without their part: the cause is told, not what follows from it.
        return next((failure for failure in failures if failure.no_space), failures[0])
    failure = None
    if rank == 0:
        gathered = {name: entry for part, _ in parts for name, entry in part.items()}
        try:
            write_manifest(directory, gathered, step=step, world_size=world_size, metadata=metadata)
        except (OSError, LoraJobsError) as found:
            failure = explain_failure(rank, found)
    return agreement.gather(failure)[0]
