"""Regular expressions of a spec over module names, with a limit on the processor time that they may take."""

from __future__ import annotations

import re
import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lora_jobs.errors import Problem, SpecError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import FrameType

SECONDS = 1.0
"""Processor time for one expression over all names of a model; a sane one takes a hundredth of it."""


def match_fully(pattern: str, names: Iterable[str], *, path: str) -> frozenset[str]:
    """The names that re.fullmatch takes, as PEFT reads a target_modules that is a string."""
    expression = _compile(pattern, path)
    with _limited(pattern, path):
        return frozenset(name for name in names if expression.fullmatch(name))


def match_endings(pattern: str, names: Iterable[str], *, path: str) -> frozenset[str]:
    """The names that end in the pattern, at a dot: as PEFT reads the keys of rank_pattern and alpha_pattern.

    Source: get_pattern_key in peft/utils/other.py.
    """
    _compile(pattern, path)
    expression = re.compile(rf"(.*\.)?({pattern})$")
    with _limited(pattern, path):
        return frozenset(name for name in names if expression.match(name))


def _compile(pattern: str, path: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        message = f"{pattern!r} is not a regular expression: {error}"
        hint = "to name a layer as it is, escape its dots and brackets, or give its last part alone"
        raise SpecError(f"{path}: {message}", problems=[Problem(path, message)], hint=hint) from error


_PIECE = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.", re.DOTALL)
_DEPENDENT = re.compile(r"\\[1-9]|\(\?(?![:=!]|<[=!])")
"""A reference to a group, a named group, a flag: parts of such an expression mean something else alone."""


def split_alternatives(pattern: str) -> tuple[str, ...]:
    """An expression's alternatives outside all of its groups; itself alone where they depend on each other."""
    if _DEPENDENT.search(pattern):
        return (pattern,)
    parts, depth = [""], 0
    for piece in _PIECE.findall(pattern):
        depth += (piece == "(") - (piece == ")")
        if piece == "|" and not depth:
            parts.append("")
        else:
            parts[-1] += piece
    return tuple(parts)


@contextmanager
def _limited(pattern: str, path: str) -> Iterator[None]:
    """Stop matching that backtracks without end: re looks for signals while it matches. In the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        message = f"{pattern!r} takes more than {SECONDS:g} s to match the model's layer names; PEFT would hang on it"
        hint = "a repetition within a repetition, such as (a+)+, backtracks without end: write a simpler expression"
        raise SpecError(f"{path}: {message}", problems=[Problem(path, message)], hint=hint)

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
