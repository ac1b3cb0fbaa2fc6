"""The screen: stdout for answers, stderr for messages; text from outside is never markup and never moves the cursor."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TextIO

from lora_jobs.units import format_count, format_gib

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console
    from rich.table import Table

    from lora_jobs.errors import LoraJobsError

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
PIPE_WIDTH = 100
NARROWEST_TABLE = 80
# Select Graphic Rendition, ECMA-48.
_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}


class Line(NamedTuple):
    """One line of the screen: its text, and a style such as "bold red"."""

    plain: str
    style: str = ""


def is_coloured(stream: TextIO) -> bool:
    """True for a terminal that takes styles, unless NO_COLOR (no-color.org) is set: nothing is bold then either."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") not in ("dumb", "unknown")


def find_width() -> int:
    """Columns of the terminal; of a pipe always the same."""
    return shutil.get_terminal_size((PIPE_WIDTH, 24)).columns if sys.stdout.isatty() else PIPE_WIDTH


def find_line_width() -> int:
    """Columns of text that is wrapped and of tables, which need some: in a narrower terminal lines wrap whole."""
    return max(find_width(), NARROWEST_TABLE)


def build_console(*, stderr: bool = False) -> Console:
    """A console for tables and progress."""
    from rich.console import Console  # half of the start-up of a command that needs no table

    stream = sys.stderr if stderr else sys.stdout
    console = Console(
        file=stream,
        width=find_line_width() if stream.isatty() else PIPE_WIDTH,
        color_system="auto" if is_coloured(stream) else None,
        markup=False,
        highlight=False,
        emoji=False,
    )
    console.on_broken_pipe = _pass_on  # type: ignore[method-assign]
    return console


def _pass_on() -> NoReturn:
    """A reader that has gone, as in `lora-jobs status JOB | head`, is no error: rich would end with status 1."""
    raise BrokenPipeError


def clean(text: object) -> str:
    """Text from outside without control characters, escape sequences among them."""
    return _CONTROL.sub("�", str(text))


def clean_log(text: str) -> str:
    """A log's text without escape sequences; on a terminal they could move the cursor or more."""
    return _ESCAPE.sub("", text)


def say(text: object = "", style: str = "") -> None:
    """One plain line on stdout, never wrapped."""
    _write(sys.stdout, text, style)


def warn(text: object, style: str = "yellow") -> None:
    """One plain line on stderr, never wrapped."""
    _write(sys.stderr, text, style)


def _write(stream: TextIO, text: object, style: str) -> None:
    words = clean(text)
    if style and words and is_coloured(stream):
        words = f"\x1b[{';'.join(_STYLES[word] for word in style.split())}m{words}\x1b[0m"
    stream.write(words + "\n")
    stream.flush()


def build_table(*columns: str, right: Sequence[str | int] = ()) -> Table:
    """A table without lines; `right` names the columns, or their numbers, that are set to the right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", show_header=any(columns))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if column in right or number in right else "left", overflow="fold")
    return table


def add_row(table: Table, *cells: object, style: str = "") -> None:
    """One row of plain text; None is an empty cell."""
    from rich.text import Text

    table.add_row(*(Text(clean("" if cell is None else cell)) for cell in cells), style=style)


def show_rows(name: str, rows: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """A list of rows with the same keys, as a table or as {name: rows}."""
    if as_json:
        print_json({name: list(rows)})
        return
    table = build_table(*(key.removesuffix("_bytes").replace("_", " ").upper() for key in rows[0]))
    for row in rows:
        add_row(table, *(_cell(key, value) for key, value in row.items()))
    build_console().print(table)


def _cell(key: str, value: Any) -> Any:
    if key.endswith("_bytes"):
        return format_gib(value)
    return format_count(value) if isinstance(value, int) else value


def print_json(value: Mapping[str, Any]) -> None:
    """The one JSON document of a --json command."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def show_error(error: LoraJobsError) -> None:
    """What, where, seen versus wanted, and the next step."""
    problems = getattr(error, "problems", ())
    same = [problem for problem in problems if problem.message == error.message and problem.line is None]
    place = next((f"{problem.path}: " for problem in same if problem.path), "")
    warn(f"error: {place}{error.message}", style="bold red")
    for problem in problems:
        if problem in same:
            continue
        where = f"line {problem.line}: " if problem.line else ""
        warn(f"  {where}{problem.path}: {problem.message}" if problem.path else f"  {where}{problem.message}", style="")
    if error.hint:
        warn(f"next: {error.hint}", style="")


def error_to_json(error: LoraJobsError) -> dict[str, Any]:
    """The JSON document of a --json command that failed."""
    return {
        "error": error.message,
        "hint": error.hint,
        "exit_code": error.exit_code,
        "problems": [problem.to_json() for problem in getattr(error, "problems", ())],
    }
