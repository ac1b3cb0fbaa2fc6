"""One submitter at a time: two resumes that both saw a stopped run would start two writers."""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING

from lora_jobs.errors import RunError
from lora_jobs.runs.durable import explain_errors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_jobs.runs.store import Run


@contextlib.contextmanager
def hold_run(run: Run) -> Iterator[None]:
    """The right to submit this run, until the block ends or this process does. Raises RunError when it is taken."""
    path = run.directory / ".lock"
    with explain_errors("lock", path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            hint = f"lora-jobs status {run.id} shows what came of it"
            raise RunError(f"another lora-jobs is submitting {run.id} right now", hint=hint) from error
        yield
    finally:
        os.close(descriptor)
