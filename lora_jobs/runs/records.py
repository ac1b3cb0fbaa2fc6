"""A value from one JSON record: unknown keys are skipped, a wrong or missing one makes no value."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from msgspec import Struct, ValidationError, convert

if TYPE_CHECKING:
    from collections.abc import Mapping

_T = TypeVar("_T", bound=Struct)


def read_record(kind: type[_T], record: Mapping[str, object]) -> _T | None:
    """The value, or None where a field is missing that has no default, or is of another type than it says."""
    try:
        return convert(record, kind)
    except ValidationError:
        return None
