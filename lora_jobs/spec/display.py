"""Outside text as it may be shown on a terminal: short, on one line, nothing unprintable."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

_LONGEST = 80


def show_key(text: str) -> str:
    """A key or file name, escaped where a character does not print, cut when very long."""
    shown = text if text.isprintable() else ascii(text)[1:-1]
    return shown if len(shown) <= 4 * _LONGEST else f"{shown[: 4 * _LONGEST]}..."


def show_value(value: Any) -> str:
    """A value as YAML would have it, cut when long: true, null, 'text', [1, 2]."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list | tuple):
        shown = f"[{', '.join(show_value(item) for item in value[:20])}]"
    elif isinstance(value, int) and value.bit_length() > 200:
        shown = "a very large number"
    else:
        shown = repr(value) if not isinstance(value, str) or value.isprintable() else ascii(value)
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}..."


def find_nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that was probably meant, or None."""
    lowered = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)
    return lowered[found[0]] if found else None
