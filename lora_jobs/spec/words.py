"""The kinds of single values in a spec: texts that are safe to write into a script, sizes, durations, numbers."""

from __future__ import annotations

import re
import warnings
from typing import Annotated

from pydantic import AfterValidator, Field

from lora_jobs.units import parse_duration, parse_size

NAME_PATTERN = r"^[A-Za-z][A-Za-z0-9._-]{0,63}$"
WORD_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:+@-]{0,127}$"
COMMIT_PATTERN = r"[0-9a-f]{40}"
# No other slash: the hub's cache keeps a revision as a file name.
REVISION_PATTERN = r"^(refs/pr/[0-9]{1,9}|[A-Za-z0-9][A-Za-z0-9._-]{0,127})$"
CONSTRAINT_PATTERN = r"^[A-Za-z0-9_.&|*()\[\],-]{1,128}$"
SIZE_PATTERN = r"^[0-9]{1,9}(\.[0-9]{1,3})?[KMGTkmgt]?$"
DURATION_PATTERN = r"^([0-9]{1,4}-)?[0-9]{1,6}(:[0-9]{1,2}){0,2}$"
VARIABLE_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]{0,127}$"

# What a value that breaks a pattern should have been; shown to the user instead of the pattern.
PATTERN_WORDS = {
    NAME_PATTERN: "a letter, then letters, digits, dots, underscores or dashes, 64 at most",
    WORD_PATTERN: "one word of letters, digits and . _ : + @ -, without spaces or slashes",
    REVISION_PATTERN: "a commit, tag or branch: letters, digits, dots, underscores, dashes; or refs/pr/N",
    CONSTRAINT_PATTERN: "Slurm features joined by & or |, without spaces",
    SIZE_PATTERN: "a number with K, M, G or T, such as 64G",
    DURATION_PATTERN: "[days-]hours:minutes:seconds, such as 24:00:00",
    VARIABLE_PATTERN: "a variable name: letters, digits and underscores, not starting with a digit",
}

# C0, DEL, C1, line and paragraph separators, direction overrides, and halves of surrogate pairs.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def check_line(text: str) -> str:
    """The text, if no character of it could break a line, steer a terminal or fail to be written."""
    if (found := _UNSAFE.search(text)) is not None:
        raise ValueError(f"control character {found[0]!a} is not allowed here")
    return text


def check_prose(text: str) -> str:
    """As check_line, with line breaks and tabs allowed."""
    check_line(text.replace("\n", " ").replace("\t", " "))
    return text


def check_expression(text: str) -> str:
    """The text, if it is a regular expression."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{text!r} is not a regular expression: {error}") from error
    return text


def check_size(text: str) -> str:
    """The text, if it is a Slurm size."""
    parse_size(text)
    return text


def check_duration(text: str) -> str:
    """The text, if it is a Slurm time above zero."""
    if parse_duration(text) <= 0:
        raise ValueError(f"{text!r} is no time at all: wanted more than zero")
    return text


def read_whole_float(value: object) -> object:
    """5e8 as 500000000; everything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Text = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(check_line)]
Names = Annotated[tuple[Text, ...], Field(strict=False)]
Prose = Annotated[str, Field(min_length=1, max_length=20_000), AfterValidator(check_prose)]
Word = Annotated[str, Field(pattern=WORD_PATTERN)]
Size = Annotated[str, Field(pattern=SIZE_PATTERN), AfterValidator(check_size)]
Duration = Annotated[str, Field(pattern=DURATION_PATTERN), AfterValidator(check_duration)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Natural = Annotated[int, Field(ge=0, le=2**31 - 1)]
# YAML reads "1" as an integer; a float field takes it.
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
