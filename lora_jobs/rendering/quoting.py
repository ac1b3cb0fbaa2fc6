"""Text from outside, made safe for the two readers of a batch script: bash, and sbatch's own parser."""

from __future__ import annotations

import re
import shlex
import unicodedata

from lora_jobs.errors import Problem, SpecError

# Control characters, line and paragraph separators, lone surrogates (a path that is not UTF-8).
_REFUSED_CATEGORIES = frozenset({"Cc", "Zl", "Zp", "Cs"})
# Marks that reorder the text on a screen: a reviewer would read another script than bash runs.
_REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:+@-]*", re.ASCII)
_PLAIN = re.compile(r"[A-Za-z0-9_.:+@%/,=-]+", re.ASCII)
_CONSTRAINT = re.compile(r"[A-Za-z0-9_.:&|*()\[\],=-]+", re.ASCII)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
# What submitit replaces in the name of its folder: %j, %t, %A, %a.
_SUBMITIT_TAG = re.compile(r"%[jtAa]")


def _refuse(where: str, message: str) -> SpecError:
    problem = Problem(path=where, message=message)
    return SpecError(f"{where} can't stand in a batch script: {message}", problems=(problem,))


def require_printable(text: str, where: str) -> str:
    """`text`, or SpecError when a character of it would end a line, hide, or could not be written."""
    for character in text:
        if unicodedata.category(character) in _REFUSED_CATEGORIES or character in _REORDERING:
            raise _refuse(where, f"character {character!a} is not allowed, seen in {text!a}")
    return text


def quote_shell(text: str, where: str) -> str:
    """One word of bash that means exactly `text`."""
    return shlex.quote(require_printable(text, where))


def require_variable(name: str, where: str) -> str:
    """A name that can stand after `export`."""
    if _VARIABLE.fullmatch(name) is None:
        raise _refuse(where, f"{name!a} is not a variable name (wanted letters, digits and _)")
    return name


def require_word(text: str, where: str) -> str:
    """A value of an #SBATCH line as it is: nothing in it that sbatch or bash would read as more than a letter."""
    if _WORD.fullmatch(require_printable(text, where)) is None:
        raise _refuse(where, f"{text!a} is not one word of letters, digits and _ . : + @ -")
    return text


def quote_constraint(text: str, where: str) -> str:
    """A --constraint expression, in double quotes: sbatch takes them off, and it may hold & | * ( ) [ ]."""
    if _CONSTRAINT.fullmatch(require_printable(text, where)) is None or text.startswith("-"):
        raise _refuse(where, f"{text!a} is not a --constraint expression")
    return f'"{text}"'


def quote_log_path(path: str, where: str) -> str:
    """A file name pattern of an #SBATCH line; in double quotes when it holds more than plain letters.

    sbatch takes the quotes off. A double quote would end them, and a backslash turns off the patterns, so both are
    refused. Source: sbatch(1), FILENAME PATTERN; tests/unit/rendering/test_sbatch_reads.py asks the real one.
    """
    if found := set(require_printable(path, where)) & {'"', "\\"}:
        raise _refuse(where, f"{' and '.join(sorted(found))} in {path!a}: sbatch can't be given such a path")
    return path if _PLAIN.fullmatch(path) else f'"{path}"'


def escape_pattern(path: str) -> str:
    """`path` for an option that replaces %-patterns: %% is one %. Source: sbatch(1), FILENAME PATTERN."""
    return path.replace("%", "%%")


def require_folder(path: str, where: str) -> str:
    """A directory that sbatch, srun and submitit can all be given: absolute, without their patterns."""
    if not require_printable(path, where).startswith("/"):
        raise _refuse(where, f"{path!a} is not an absolute path")
    if ".." in path.split("/"):
        raise _refuse(where, f"{path!a} holds ..")
    if (tag := _SUBMITIT_TAG.search(path)) is not None:
        raise _refuse(where, f"{tag[0]} in {path!a} would be replaced by submitit; rename that directory")
    return path
