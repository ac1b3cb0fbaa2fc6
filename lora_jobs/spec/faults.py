"""What pydantic found wrong, in the words of somebody who writes the YAML."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from msgspec import Struct
from pydantic import BaseModel

from lora_jobs.spec.display import find_nearest, show_key, show_value
from lora_jobs.spec.section import ConflictError, Section
from lora_jobs.spec.words import PATTERN_WORDS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

    from lora_jobs.spec.source import KeyPath


class Fault(Struct, frozen=True):
    """One thing wrong: the key to show, what is wrong with it, and every key that was looked at to say so."""

    path: KeyPath
    message: str
    looked_at: tuple[KeyPath, ...]


def list_faults(model: type[Section], error: ValidationError, values: Any) -> list[Fault]:
    """The faults of a failed validation of `values`, one for each key at most."""
    faults: dict[KeyPath, Fault] = {}
    for detail in error.errors():
        for fault in _describe(model, detail, values):
            faults.setdefault(fault.path, fault)
    return list(faults.values())


def _spell_location(model: type[Section], location: tuple[int | str, ...], values: Any) -> tuple[int | str, ...]:
    """The location as the file spells it: a key's older word where the file uses that one."""
    if not location:
        return location
    *above, key = location
    section = find_section(model, tuple(above))
    inner = _find_value(values, tuple(above))
    if section is None or not isinstance(inner, dict) or key in inner:
        return location
    older = (old for old, new in section.older_words.items() if new == key and old in inner)
    return (*above, next(older, key))


def find_section(model: type[Section], path: KeyPath) -> type[Section] | None:
    """The section that a path of keys leads to, or None where it leads to a value."""
    if not path:
        return model
    key, rest = str(path[0]), path[1:]
    field = model.model_fields.get(key)
    if field is None:
        return None
    for inner, is_mapping in _list_sections(field.annotation):
        if is_mapping and rest:
            return find_section(inner, rest[1:])
        if not is_mapping:
            return find_section(inner, rest)
    return None


def _list_sections(annotation: Any, *, in_mapping: bool = False) -> Iterator[tuple[type[Section], bool]]:
    """Sections named in a type, and whether each is the value of a mapping: `X | None`, `dict[str, X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if issubclass(annotation, Section):
            yield annotation, in_mapping
        return
    is_dict = getattr(annotation, "__origin__", None) is dict
    for argument in get_args(annotation):
        yield from _list_sections(argument, in_mapping=in_mapping or is_dict)


def _find_value(values: Any, path: KeyPath) -> Any:
    for key in path:
        if isinstance(values, dict):
            values = values.get(key)
        elif isinstance(values, list | tuple) and isinstance(key, int) and key < len(values):
            values = values[key]
        else:
            return None
    return values


def _strip_branches(location: tuple[int | str, ...], values: Any, *, missing: bool) -> KeyPath:
    """pydantic's location without the names of union branches, which stand for no key of the file."""
    path: list[int | str] = []
    for depth, part in enumerate(location, start=1):
        if isinstance(values, dict):
            if part in values or (missing and depth == len(location)):
                path.append(part)
                values = values.get(part)
        elif isinstance(values, list | tuple) and isinstance(part, int):
            path.append(part)
            values = values[part] if part < len(values) else None
    return tuple(path)


def _describe(model: type[Section], detail: ErrorDetails, values: Any) -> list[Fault]:
    missing = detail["type"] == "missing"
    path = _strip_branches(_spell_location(model, detail["loc"], values), values, missing=missing)
    context = detail.get("ctx", {})
    cause = context.get("error")
    if isinstance(cause, ConflictError):
        return [_describe_conflict(path, conflict.keys, conflict.message) for conflict in cause.conflicts]
    is_about_key = path != () and detail["loc"][-1] == "[key]"
    seen = path[-1] if is_about_key else _find_value(values, path)
    if detail["type"] == "extra_forbidden":
        return [Fault(path, _describe_unknown(model, path), (path,))]
    if missing:
        return [Fault(path, _describe_missing(model, path), (path,))]
    return [Fault(path, _describe_value(detail["type"], context, seen, detail["msg"]), (path,))]


def _describe_conflict(path: KeyPath, keys: tuple[str, ...], message: str) -> Fault:
    looked_at = tuple((*path, *split_key(key)) for key in keys)
    return Fault(looked_at[0], message, looked_at)


def split_key(key: str) -> KeyPath:
    """A dotted key as a path; what a sweep names is one key, dots and all."""
    return ("sweep", key.removeprefix("sweep.")) if key.startswith("sweep.") else tuple(key.split("."))


def _describe_missing(model: type[Section], path: KeyPath) -> str:
    section = find_section(model, path[:-1])
    field = None if section is None else section.model_fields.get(str(path[-1]))
    what = f" ({field.description})" if field is not None and field.description else ""
    return f"is missing, and there is no default{what}"


def _describe_unknown(model: type[Section], path: KeyPath) -> str:
    section, key = find_section(model, path[:-1]), str(path[-1])
    if section is None:
        return "unknown key"
    if (reason := section.unneeded_words.get(key)) is not None:
        return f"is not needed here, leave it out: {reason}"
    known = [*section.model_fields, *section.older_words]
    last = key.rpartition(".")[2]
    for name, field in model.model_fields.items():
        for inner, is_mapping in _list_sections(field.annotation):
            if not is_mapping and inner is not section and last in inner.model_fields:
                return f"unknown key here; did you mean the key {last} of the section {name}?"
    if (nearest := find_nearest(key, known)) is not None:
        return f"unknown key; did you mean {nearest}?"
    return f"unknown key; known here: {', '.join(known)}"


# pydantic's error type -> what was wanted; {} takes the limit.
_WANTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a section (key: value lines)",
    "model_type": "a section (key: value lines)",
    "model_attributes_type": "a section (key: value lines)",
    "finite_number": "a finite number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "string_unicode": "text without halves of surrogate pairs",
}


def _describe_value(kind: str, context: Mapping[str, Any], seen: Any, otherwise: str) -> str:
    shown = show_value(seen)
    if kind in {"value_error", "assertion_error"}:
        return show_key(str(context.get("error")))
    if kind == "literal_error":
        return _describe_literal(str(context["expected"]), seen)
    if kind == "string_pattern_mismatch":
        return f"{shown} is not allowed here: wanted {PATTERN_WORDS.get(context['pattern'], context['pattern'])}"
    if kind in {"string_too_short", "too_short"}:
        return "is empty"
    if kind in {"string_too_long", "too_long"}:
        return f"is too long: at most {context['max_length']}"
    if kind in _WANTED:
        limits = {name: f"{limit:g}" if isinstance(limit, float) else limit for name, limit in context.items()}
        wanted = _WANTED[kind].format(**limits)
        quotes = (
            f': put it in quotes, "{shown}"' if kind == "string_type" and isinstance(seen, bool | int | float) else ""
        )
        empty = ": fill it in, or leave the key out" if seen is None else ""
        return f"wanted {wanted}, got {shown}{quotes}{empty}"
    return f"{show_key(otherwise)}; got {shown}"


def _describe_literal(expected: str, seen: Any) -> str:
    choices = [choice.strip(" '") for choice in expected.replace(" or ", ", ").split(", ")]
    nearest = find_nearest(seen, choices) if isinstance(seen, str) else None
    meant = f"; did you mean {nearest}?" if nearest is not None else ""
    return f"wanted one of {', '.join(choices)}, got {show_value(seen)}{meant}"
