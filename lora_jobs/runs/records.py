"""A frozen dataclass from one JSON record: unknown keys are skipped, a wrong or missing one makes no value."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping

_T = TypeVar("_T")


def read_record(kind: type[_T], record: Mapping[str, Any], wanted: Mapping[str, type | tuple[type, ...]]) -> _T | None:
    """The value, or None where a field is missing that has no default, or is of another type than `wanted` says.

    A None is taken where the field's default is None.
    """
    values: dict[str, Any] = {}
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name not in record:
            if field.default is MISSING:
                return None
            continue
        value = record[field.name]
        is_absent = value is None and field.default is None
        if not is_absent and (not isinstance(value, wanted[field.name]) or isinstance(value, bool)):
            return None
        values[field.name] = value
    return kind(**values)
