"""Rows of a Parquet file through pyarrow, which the job's environment has and a login node may lack."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BATCH_ROWS = 1024


class BrokenParquetError(ValueError):
    """What pyarrow says of a file that is no Parquet or not a whole one, in one line."""


def can_read_parquet() -> bool:
    """Whether pyarrow is installed; it is not imported for the answer."""
    return importlib.util.find_spec("pyarrow") is not None


def iterate_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """The rows as plain values, a batch in memory at a time. Errors: OSError, BrokenParquetError."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with path.open("rb") as stream:
            for batch in ParquetFile(stream).iter_batches(BATCH_ROWS):
                yield from batch.to_pylist()
    except ArrowException as error:
        raise BrokenParquetError((str(error).splitlines() or [type(error).__name__])[0][:200]) from error
