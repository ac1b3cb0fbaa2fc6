"""What training measured, one record a step: `step`, `epoch`, `time`, `kind` (train, eval, sample, note), numbers."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from lora_jobs.runs.durable import append_line, explain_errors, load_lines, parse_lines, sync_file

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_jobs.runs.store import Run

_CHUNK_BYTES = 64 * 1024


def append_metrics(run: Run, record: Mapping[str, Any], *, durable: bool = True) -> None:
    """Adds one record; NaN and infinities become null, their keys listed under not_finite. Raises RunError.

    Readers see it at once in any case; one that is not `durable` may be lost when the machine fails before the next.
    """
    append_line(run.metrics_path, record, durable=durable)


def sync_metrics(run: Run) -> None:
    """Makes all records so far durable: before a checkpoint is committed. Raises RunError."""
    sync_file(run.metrics_path)


def load_metrics(run: Run) -> list[dict[str, Any]]:
    """All records in the order written. Steps trained again after a kill stand there twice: the later one counts."""
    return load_lines(run.metrics_path)


def latest_metrics(run: Run, kind: str | None = None, *, most_bytes: int | None = None) -> dict[str, Any] | None:
    """The last record, of that kind if one is named; reads from the end, no more of the file than it needs.

    None where the last `most_bytes` hold none (about: the pieces that are read grow).
    """
    word = b"" if kind is None else json.dumps(kind).encode()
    with explain_errors("read", run.metrics_path):
        try:
            stream = run.metrics_path.open("rb")
        except FileNotFoundError:
            return None
        with stream:
            end = stream.seek(0, os.SEEK_END)
            length = _CHUNK_BYTES
            while True:
                start = max(end - length, 0)
                stream.seek(start)
                data = stream.read(end - start)
                # The first line of a chunk is cut, unless the chunk is the whole file.
                whole = data if start == 0 else data.partition(b"\n")[2]
                lines = b"\n".join(line for line in whole.split(b"\n") if word in line)  # few of many are parsed
                records = [row for row in parse_lines(lines) if kind is None or row.get("kind") == kind]
                if records:
                    return records[-1]
                if start == 0 or (most_bytes is not None and length >= most_bytes):
                    return None
                length *= 4
