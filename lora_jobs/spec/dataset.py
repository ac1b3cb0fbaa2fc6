"""The examples: JSONL files, one row a line, or Parquet files; read without any GPU library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_jobs.errors import Problem, SpecError
from lora_jobs.spec.display import find_nearest, show_key, show_value
from lora_jobs.spec.parquet import BrokenParquetError, can_read_parquet, iterate_parquet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_jobs.spec.job import DataSpec

MAX_PROBLEMS = 20
MAX_LINE_BYTES = 64 * 1024 * 1024
# Gemma's own word for the assistant is model.
ROLES = ("system", "user", "assistant", "model", "tool")
KEYS_OF_FORMAT = {
    "prompt_completion": ("prompt", "completion"),
    "chat": ("messages",),
    "text": ("text",),
    "svg_caption": ("svg", "caption"),
}


def iterate_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file, empty lines left out, or of a Parquet file. SpecError with file and line number."""
    if is_parquet(path) and not can_read_parquet():
        raise SpecError(f"{show_key(str(path))} can't be read: pyarrow is not installed", hint="pip install pyarrow")
    try:
        for number, row in _iterate_numbered(path):
            if isinstance(row, str):
                raise SpecError(f"{show_key(str(path))} {_word(path)} {number}: {row}")
            yield row
    except BrokenParquetError as error:
        raise SpecError(f"{show_key(str(path))} is no whole Parquet file: {show_key(str(error))}") from error
    except OSError as error:
        raise SpecError(f"{show_key(str(path))} cannot be read: {error.strerror or error}") from error


def is_parquet(path: Path) -> bool:
    """By its name, as every reader of Parquet goes by it."""
    return path.suffix == ".parquet"


def find_data_problems(data: DataSpec) -> list[Problem]:
    """What is wrong with the files of `data`: missing, broken lines by number, rows without what the format needs.

    Stops after about 20 problems a file. Splits of a data.dataset are looked at by `lora-jobs data` and by the job, as
    is a Parquet file where pyarrow is not installed.
    """
    if data.dataset is not None:
        return []
    found = _find_file_problems("data.train", Path(data.train), data.format)
    if data.eval is not None:
        found += _find_file_problems("data.eval", Path(data.eval), data.format)
    return found


def _find_file_problems(key: str, path: Path, data_format: str) -> list[Problem]:
    shown = show_key(str(path))
    if not path.exists():
        return [Problem(key, f"{shown}: no such file (from {show_key(str(Path.cwd()))})")]
    if not path.is_file():
        return [Problem(key, f"{shown} is no regular file: wanted JSONL, one row a line, or Parquet")]
    if is_parquet(path) and not can_read_parquet():
        return []
    found: list[Problem] = []
    rows = 0
    try:
        for number, row in _iterate_numbered(path):
            rows += 1
            if rows == 1 and isinstance(row, dict) and (fitting := find_fitting_format(row, data_format)) is not None:
                keys = " and ".join(KEYS_OF_FORMAT[fitting])
                return [
                    Problem("data.format", f"is {data_format}, but the rows of {shown} have {keys}: wanted {fitting}")
                ]
            faults = [row] if isinstance(row, str) else find_row_faults(row, data_format)
            found.extend(Problem(key, f"{shown} {_word(path)} {number}: {fault}") for fault in faults)
            if len(found) >= MAX_PROBLEMS:
                return [*found[:MAX_PROBLEMS], Problem(key, f"{shown}: stopped here, there may be more")]
    except BrokenParquetError as error:
        return [*found, Problem(key, f"{shown} is no whole Parquet file: {show_key(str(error))}")]
    except OSError as error:
        return [*found, Problem(key, f"{shown} cannot be read: {error.strerror or error}")]
    return found if rows else [Problem(key, f"{shown} has no rows")]


def _word(path: Path) -> str:
    return "row" if is_parquet(path) else "line"


def _iterate_numbered(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    return enumerate(iterate_parquet(path), start=1) if is_parquet(path) else _iterate_lines(path)


def _iterate_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Line number and row, or line number and what is wrong with the line."""
    with path.open("rb") as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES):
            number += 1
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                yield number, f"longer than {MAX_LINE_BYTES} bytes"
                return
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, _parse_row(line)


def _parse_row(line: bytes) -> dict[str, Any] | str:
    try:
        row = json.loads(line.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"byte {error.start + 1} is not UTF-8 text"
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        return f"not usable JSON: {show_key(str(error))}"
    return row if isinstance(row, dict) else f"wanted an object with keys, got {show_value(row)}"


def find_fitting_format(row: dict[str, Any], data_format: str) -> str | None:
    """The format that a row has all keys of, where it lacks every key of the one that is asked for."""
    if any(key in row for key in KEYS_OF_FORMAT[data_format]):
        return None
    return next((name for name, keys in KEYS_OF_FORMAT.items() if all(key in row for key in keys)), None)


def find_row_faults(row: dict[str, Any], data_format: str) -> list[str]:
    """What a row lacks for its format, each fault in words; empty for a good row."""
    faults = []
    for key in KEYS_OF_FORMAT[data_format]:
        if key not in row:
            nearest = find_nearest(key, row)
            meant = f"; is it {show_key(nearest)!r}?" if nearest is not None else ""
            keys = ", ".join(show_key(name) for name in list(row)[:8]) or "none"
            faults.append(f"no key {key!r}{meant} (keys here: {keys})")
        elif key == "messages":
            faults.extend(_find_message_faults(row[key]))
        elif (fault := _find_text_fault(row[key])) is not None:
            faults.append(f"{key} {fault}")
    return faults


def _find_text_fault(value: Any) -> str | None:
    if not isinstance(value, str):
        return f"is {show_value(value)}: wanted text"
    if not value.strip():
        return "is empty"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return "holds half of a surrogate pair: no tokenizer can read it"
    return None


def _find_message_faults(messages: Any) -> list[str]:
    if not isinstance(messages, list) or not messages:
        return [f"messages is {show_value(messages)}: wanted a list of role and content"]
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            return [f"{where} is {show_value(message)}: wanted role and content"]
        if message.get("role") not in ROLES:
            return [f"{where} has role {show_value(message.get('role'))}: wanted one of {', '.join(ROLES)}"]
        if (fault := _find_text_fault(message.get("content"))) is not None:
            return [f"content of {where} {fault}"]
    if messages[-1]["role"] not in {"assistant", "model"}:
        return ["the last message is not the assistant's: there is nothing to learn"]
    return []
