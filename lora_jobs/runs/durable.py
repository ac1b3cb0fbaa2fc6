"""Files that are whole or not there: nothing is written in place, and what was written survives a crash."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_jobs.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_HINTS = {
    errno.ENOSPC: "free some space there, or set LORA_JOBS_HOME to a directory on another disk",
    errno.EDQUOT: "your quota is used up: free some space, or set LORA_JOBS_HOME to a directory elsewhere",
    errno.EACCES: "change its permissions, or set LORA_JOBS_HOME to a directory you may write to",
    errno.EPERM: "change its permissions, or set LORA_JOBS_HOME to a directory you may write to",
    errno.EROFS: "set LORA_JOBS_HOME to a directory you may write to",
    errno.ENOTDIR: "a file stands where a directory is wanted: move it, or set LORA_JOBS_HOME",
}


@contextlib.contextmanager
def explain_errors(action: str, path: Path) -> Iterator[None]:
    """Turns an OSError inside the block into a RunError that says what was done to which path, and what to try."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(f"cannot {action} {path}: {reason}", hint=_HINTS.get(error.errno or 0)) from error


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes the file as a whole: temporary sibling (mode 0600), fsync, rename, fsync of the directory.

    Raises RunError; the file is then as it was before, and no temporary file is left.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    with explain_errors("write", path):
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Makes the directory's entries durable; file systems that cannot do so are left alone."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}:
            raise
    finally:
        os.close(descriptor)


def sync_filesystem(path: Path) -> None:
    """Makes everything written to the file system of `path` durable: one call for thousands of files. Linux only."""
    import ctypes

    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if library.syncfs(descriptor) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(descriptor)


def append_line(path: Path, record: Mapping[str, Any], *, durable: bool = True) -> None:
    """Adds one JSON line by one write at the end of the file, then (if `durable`) fsync. Raises RunError.

    A torn last line, left by a kill or a full disk, is ended first: it costs itself, never the new record.
    """
    line = (json.dumps(_make_finite(record), ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
    with explain_errors("append to", path):
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line
            while line:
                line = line[os.write(descriptor, line) :]
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_file(path: Path) -> None:
    """Makes everything written to the file so far durable; nothing where there is no file. Raises RunError."""
    with explain_errors("write", path):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _make_finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: such a value becomes null, and its key is listed under not_finite."""
    broken = [key for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
    finite = {key: None if key in broken else value for key, value in record.items()}
    return {**finite, "not_finite": broken} if broken else finite


def load_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; none where there is no file. Torn lines are left out. Raises RunError."""
    with explain_errors("read", path):
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return []
    return parse_lines(data)


def parse_lines(data: bytes) -> list[dict[str, Any]]:
    """The JSON objects among the lines; whatever is torn is left out."""
    records = []
    for line in data.split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def render_lines(records: list[dict[str, Any]]) -> str:
    """Records as JSON lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
