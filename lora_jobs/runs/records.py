"""A value from one JSON record: unknown keys are skipped, a wrong or missing one makes no value."""

from __future__ import annotations

from typing import TypeVar

from msgspec import Struct, ValidationError, convert

_T = TypeVar("_T", bound=Struct)


def read_record(kind: type[_T], record: object) -> _T | None:
    """The value, or None where the record is no object, or a field has another type than it says, or is missing."""
    try:
        return convert(record, kind)
    except ValidationError:
        return None
