"""One submitter and one writer at a time: two resumes that both saw a stopped run would start two trainings of it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import uuid
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import asdict

from lora_jobs.errors import RunError
from lora_jobs.runs.durable import explain_errors, write_atomic
from lora_jobs.runs.records import read_record

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lora_jobs.runs.store import Run

RENEW_SECONDS = 15.0
STALE_SECONDS = 90.0
_NO_LOCKS = (
    "the file system has no locks (Lustre mounted without -o flock): set LORA_JOBS_HOME to a directory elsewhere"
)


@contextlib.contextmanager
def hold_run(run: Run) -> Iterator[None]:
    """The right to submit this run, until the block ends or this process does. Raises RunError when it is taken."""
    with _lock(run.directory / ".lock", wait=False) as held:
        if not held:
            hint = f"lora-jobs status {run.id} shows what came of it"
            raise RunError(f"another lora-jobs is submitting {run.id} right now", hint=hint)
        yield


class Lease(Struct, frozen=True):
    """Who trains a run: rank 0 of one start of one job. Its file is renewed while that process lives."""

    job_id: str
    restart_count: int
    host: str
    pid: int
    created_at: float
    token: str


def take_lease(run: Run, *, job_id: str, restart_count: int, stale_seconds: float = STALE_SECONDS) -> Lease:
    """The right to train this run, as this process. Waits until a lease of a vanished holder is stale.

    Raises RunError where its holder lives: known by its process on this machine, else by renewing its lease.
    """
    import psutil  # a look at the queue starts without it

    process = psutil.Process()
    mine = Lease(job_id, restart_count, socket.gethostname(), process.pid, process.create_time(), uuid.uuid4().hex)
    while True:
        with _lock(_path(run).with_name(".lease.lock"), wait=True):
            holder = load_lease(run)
            if holder is None or _is_over(holder, mine) or _age(run) > stale_seconds:
                write_atomic(_path(run), json.dumps(asdict(mine)) + "\n")
                return mine
        if holder.host == mine.host or not _stays_silent(run, stale_seconds):
            raise RunError(
                f"{run.id} is being trained by job {holder.job_id} on {holder.host} (process {holder.pid})",
                hint=f"lora-jobs status {run.id} shows it; lora-jobs cancel {run.id} stops it",
            )


def load_lease(run: Run) -> Lease | None:
    """Who trains the run; None where nobody does. Raises RunError."""
    with explain_errors("read", _path(run)):
        try:
            record = json.loads(_path(run).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
    return read_record(Lease, record)


def renew_lease(run: Run, lease: Lease) -> bool:
    """Say that its holder lives. False where somebody else has taken it meanwhile: then nothing may be written."""
    if load_lease(run) != lease:
        return False
    with explain_errors("touch", _path(run)):
        os.utime(_path(run))
    return True


def release_lease(run: Run, lease: Lease) -> None:
    """Give the run back, if it is still held by this lease."""
    if load_lease(run) == lease:
        _path(run).unlink(missing_ok=True)


def _path(run: Run) -> Path:
    return run.directory / "lease.json"


def _is_over(holder: Lease, mine: Lease) -> bool:
    """The holder is gone for certain: an earlier start of this very job, or a process of this machine that ended."""
    if holder.job_id == mine.job_id and holder.restart_count < mine.restart_count:
        return True
    if holder.host != mine.host:
        return False
    import psutil

    try:
        process = psutil.Process(holder.pid)
        same = abs(process.create_time() - holder.created_at) < 1.0
        return not same or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _age(run: Run) -> float:
    """Seconds since the lease was renewed, by the file system's own clock: those of two nodes may differ."""
    probe = _path(run).with_name(f".lease.{uuid.uuid4().hex}.tmp")
    try:
        probe.touch(mode=0o600)
        return probe.stat().st_mtime - _path(run).stat().st_mtime
    except FileNotFoundError:
        return float("inf")
    finally:
        probe.unlink(missing_ok=True)


def _stays_silent(run: Run, seconds: float) -> bool:
    """Whether the lease is not renewed until it is stale; returns as soon as it is known."""
    before = _renewed_at(run)
    while _age(run) <= seconds:
        if _renewed_at(run) not in (before, None):
            return False
        time.sleep(min(1.0, seconds / 10))
    return True


def _renewed_at(run: Run) -> int | None:
    try:
        return _path(run).stat().st_mtime_ns
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _lock(path: Path, *, wait: bool) -> Iterator[bool]:
    with explain_errors("lock", path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        held = _take_lock(descriptor, path, wait=wait)
        yield held
    finally:
        os.close(descriptor)


def _take_lock(descriptor: int, path: Path, *, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        hint = _NO_LOCKS if error.errno in {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP} else None
        raise RunError(f"cannot lock {path}: {error.strerror}", hint=hint) from error
    return True
