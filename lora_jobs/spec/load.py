"""A YAML file to a typed value; everything wrong with it is said at once, each with its key and line."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from msgspec import Struct
from pydantic import ValidationError

from lora_jobs.errors import Problem, SpecError
from lora_jobs.spec.display import show_key, show_value
from lora_jobs.spec.faults import Fault, list_faults, split_key
from lora_jobs.spec.job import JobSpec
from lora_jobs.spec.section import Section
from lora_jobs.spec.source import KeyPath, Source, load_text, parse_source, parse_value, show_path

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_M = TypeVar("_M", bound=Section)

MAX_PROBLEMS = 100

# Stands in for what is wrong, so that rules between the other keys can be tried in the same pass.
_MINIMAL_SPEC: dict[str, Any] = {
    "name": "x",
    "model": {"name_or_path": "x"},
    "lora": {"r": 8},
    "data": {"train": "x"},
    "training": {"max_steps": 1},
}


class Document(Struct, Generic[_M], frozen=True):
    """A typed value with the place it came from: the file's name and the line of every dotted key."""

    value: _M
    name: str
    lines: Mapping[str, int]
    overridden: frozenset[str] = frozenset()

    def place(self, problems: Sequence[Problem]) -> tuple[Problem, ...]:
        """The problems, each with the line of its key or of the nearest section around it, or said to be from --set."""
        return tuple(self._place(problem) for problem in problems)

    def _place(self, problem: Problem) -> Problem:
        if problem.path in self.overridden:
            return Problem(problem.path, f"{problem.message} (from --set)")
        return Problem(problem.path, problem.message, problem.line or self._find_line(problem.path))

    def _find_line(self, path: str) -> int | None:
        while path and path not in self.lines:
            path = path.rpartition(".")[0]
        return self.lines.get(path)


def load_spec(path: Path, overrides: Sequence[str] = ()) -> JobSpec:
    """The job spec in a YAML file; `overrides` are `section.key=value` and beat the file. Raises SpecError."""
    return load_document(path, overrides).value


def load_document(path: Path, overrides: Sequence[str] = ()) -> Document[JobSpec]:
    """As load_spec, with the lines kept for problems that are found later. Raises SpecError."""
    return parse_document(load_text(path), source=str(path), overrides=overrides)


def parse_spec(text: str, *, source: str, overrides: Sequence[str] = ()) -> JobSpec:
    """The job spec in a YAML text; `source` names it in messages. Raises SpecError."""
    return parse_document(text, source=source, overrides=overrides).value


def parse_document(text: str, *, source: str, overrides: Sequence[str] = ()) -> Document[JobSpec]:
    """As parse_spec, with the lines kept. Raises SpecError."""
    return build_value(JobSpec, parse_source(text, name=source), overrides=overrides, minimal=_MINIMAL_SPEC)


def replace_values(spec: JobSpec, changes: Mapping[str, Any]) -> JobSpec:
    """The spec with dotted keys set to other values, checked again. Raises SpecError."""
    values = spec.to_values()
    for key, value in changes.items():
        problem = _set_value(values, split_key(key), value)
        if problem is not None:
            raise SpecError(f"{show_key(key)} cannot be set", problems=[problem])
    source = Source(f"{spec.name} with {', '.join(changes)}", values, {})
    return build_value(JobSpec, source, minimal=_MINIMAL_SPEC).value


def override_spec(spec: JobSpec, overrides: Sequence[str]) -> JobSpec:
    """A loaded spec with `section.key=value` overrides, checked again. Raises SpecError."""
    if not overrides:
        return spec
    source = Source(spec.name, spec.to_values(), {})
    return build_value(JobSpec, source, overrides=overrides, minimal=_MINIMAL_SPEC).value


def build_value(
    model: type[_M], source: Source, *, overrides: Sequence[str] = (), minimal: Mapping[str, Any]
) -> Document[_M]:
    """The model's value from a source's plain values. Raises SpecError with every problem, in the order of lines."""
    values = source.values
    lines = dict(source.lines)
    problems = list(source.problems)
    overridden: set[KeyPath] = set()
    for override in overrides:
        problems.extend(_apply_override(values, overridden, override))
    for path in [path for path in lines if _is_within(path, overridden)]:
        del lines[path]
    value, faults = _validate(model, values, minimal)
    for fault in faults:
        from_file = not _is_within(fault.path, overridden)
        message = fault.message if from_file else f"{fault.message} (from --set{_find_quotes(fault)})"
        problems.append(Problem(show_path(fault.path), message, _find_line(fault.path, lines) if from_file else None))
    if value is None or problems:
        problems = list(dict.fromkeys(problems))
        problems.sort(key=lambda problem: (problem.line is None, problem.line or 0))
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        if len(problems) > MAX_PROBLEMS:
            problems[MAX_PROBLEMS:] = [Problem("", f"and {len(problems) - MAX_PROBLEMS} more")]
        raise SpecError(f"{show_key(source.name)}: {count}", problems=problems)
    from_flags = frozenset(show_path(path) for path in overridden)
    return Document(value, source.name, {show_path(path): line for path, line in lines.items()}, from_flags)


def _is_within(path: KeyPath, sections: set[KeyPath]) -> bool:
    return any(path[: len(section)] == section for section in sections)


def _validate(model: type[_M], values: dict[str, Any], minimal: Mapping[str, Any]) -> tuple[_M | None, list[Fault]]:
    """The value or None, and the faults.

    A rule between keys is only tried once each of its keys is right by itself. So what is wrong is taken out and
    the rest is tried again; rules that looked at a key that was taken out do not count.
    """
    faults: list[Fault] = []
    removed: set[KeyPath] = set()
    for _ in range(4):
        try:
            value = model.model_validate(values)
        except ValidationError as error:
            listed = list_faults(model, error, values)
            found = [fault for fault in listed if not any(_is_within(path, removed) for path in fault.looked_at)]
            if not found:
                return None, faults
            faults.extend(found)
            removed.update(path for fault in found for path in fault.looked_at)
            for path in removed:
                values = _without(values, path, minimal)
        else:
            return (None if faults else value), faults
    return None, faults


def _without(values: Any, path: KeyPath, minimal: Any) -> Any:
    """A copy of the values in which the key is as in `minimal`, or not there."""
    if not isinstance(values, dict):
        return minimal
    key, rest = path[0], path[1:]
    least = minimal.get(key) if isinstance(minimal, dict) else None
    if rest and isinstance(values.get(key), dict):
        return {**values, key: _without(values[key], rest, least)}
    kept = {name: value for name, value in values.items() if name != key}
    return kept if least is None else {**kept, key: least}


def _find_line(path: KeyPath, lines: Mapping[KeyPath, int]) -> int:
    """Line of the key, else of the nearest section around it, else the first."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 1)


def _find_quotes(fault: Fault) -> str:
    """How a text that looks like a number is written in a shell, which takes the outer quotes away."""
    match = re.search(r"put it in quotes, (\"[^\"]*\")$", fault.message)
    return f"; in a shell: --set '{show_path(fault.path)}={match[1]}'" if match else ""


def _apply_override(values: dict[str, Any], overridden: set[KeyPath], override: str) -> list[Problem]:
    """Sets one `section.key=value` in the values and notes its path; returns what is wrong with it."""
    key, equals, text = override.partition("=")
    path = split_key(key.strip())
    if not equals or not all(path):
        return [Problem(show_key(key), f"{show_value(override)} is no override: wanted section.key=value")]
    try:
        value = parse_value(text, name=f"--set {key}")
    except SpecError as error:
        detail = error.problems[0].message if error.problems else error.message
        return [Problem(show_key(key), f"its value {show_value(text)} is {detail.removeprefix('is ')} (from --set)")]
    problem = _set_value(values, path, value)
    if problem is not None:
        return [problem]
    overridden.add(path)
    return []


def _set_value(values: dict[str, Any], path: KeyPath, value: Any) -> Problem | None:
    section: Any = values
    for depth, key in enumerate(path[:-1]):
        if section.get(key) is None:
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            return Problem(
                show_path(path), f"{show_path(path[: depth + 1])} is no section: it is {show_value(section)}"
            )
    section[path[-1]] = value
    return None
