"""YAML text to plain values, with the line of every key, inside limits that no file can exceed.

The grammar is YAML 1.2's core schema: 1e-4 is a number, and on, yes, 24:00:00 are texts. PyYAML gives the events;
building values from them here is what makes lines, caps and duplicate keys possible in one pass.
"""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any

import yaml
from msgspec import Struct, field

from lora_jobs.errors import Problem, SpecError
from lora_jobs.spec.display import show_key, show_value

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

MAX_BYTES = 1024 * 1024
MAX_DEPTH = 24
MAX_NODES = 20_000

KeyPath = tuple[str | int, ...]

_NULLS = {"", "~", "null", "Null", "NULL"}
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_DECIMAL = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEXADECIMAL = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_MAX_DIGITS = 400
_FAST = getattr(yaml, "CSafeLoader", None)
"""libyaml's parser, where PyYAML was built with it: 25 times as fast, the same events but for tabs inside a text, and
other words for what is wrong.
"""
_STANDARD_TAGS = {"!", "tag:yaml.org,2002:str", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"}


class Source(Struct, frozen=True):
    """What a text says: its values, the 1-based line of every key and item, and what is wrong with it."""

    name: str
    values: Any
    lines: Mapping[KeyPath, int]
    problems: tuple[Problem, ...] = ()


class _Node(Struct, frozen=True):
    """A parsed node; `content` is a value, a list of nodes, or a list of (key, line, is plain, node)."""

    kind: str
    line: int
    content: Any


def resolve_plain(text: str) -> Any:
    """The value of an unquoted scalar in YAML 1.2's core schema. Raises ValueError for absurdly long numbers."""
    if text in _NULLS:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    number: Any
    if _DECIMAL.fullmatch(text):
        number, base = int, 10
    elif _OCTAL.fullmatch(text):
        number, base = int, 8
    elif _HEXADECIMAL.fullmatch(text):
        number, base = int, 16
    elif _FLOAT.fullmatch(text):
        return float(text)
    elif _INFINITE.fullmatch(text):
        return float(text.replace(".", "").lower())
    else:
        return text
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return number(text if base == 10 else text[2:], base)


def load_text(path: Path) -> str:
    """The text of a spec file: UTF-8, at most 1 MiB. Raises SpecError."""
    shown = show_key(str(path))
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise SpecError(f"{shown}: no such file", hint="lora-jobs init writes a spec to start from") from error
    except IsADirectoryError as error:
        raise SpecError(f"{shown} is a directory: wanted a YAML file") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SpecError(f"{shown} cannot be read: {reason}") from error
    if len(content) > MAX_BYTES:
        raise SpecError(f"{shown} is larger than {MAX_BYTES} bytes: that is no job spec")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        message = f"byte 0x{content[error.start]:02x} is not UTF-8 text"
        raise SpecError(
            f"{shown} is not a text file", problems=[Problem("", message, line)], hint="save the file as UTF-8"
        ) from error


def parse_source(text: str, *, name: str) -> Source:
    """Values and lines of one YAML document whose top level is a mapping. Raises SpecError where nothing can be read.

    Duplicate keys, unknown tags and keys that are no text are collected in `problems`, and reading goes on.
    """
    composer = _Composer(name)
    node = composer.compose(text)
    if node is None or (node.kind == "value" and node.content is None):
        raise SpecError(f"{show_key(name)} is empty", hint="lora-jobs init writes a spec to start from")
    if node.kind != "mapping":
        raise composer.failure(
            f"wanted `key: value` lines at the top level, got {show_value(composer.expand(node))}", 1
        )
    values = composer.expand(node)
    return Source(name, values, composer.lines, tuple(composer.problems))


def parse_value(text: str, *, name: str) -> Any:
    """One value in YAML syntax, as `--set` takes it. Raises SpecError."""
    composer = _Composer(name)
    node = composer.compose(text)
    value = None if node is None else composer.expand(node)
    if composer.problems:
        raise SpecError(f"{show_key(name)}: {composer.problems[0].message}", problems=composer.problems)
    return value


class _Composer(Struct):
    """Builds nodes from PyYAML's events, then values from nodes; both count against the caps."""

    name: str
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    anchors: dict[str, _Node] = field(default_factory=dict)
    nodes: int = 0
    expanded: int = 0

    def failure(self, message: str, line: int | None) -> SpecError:
        """The error for a text that cannot be read any further."""
        problems = [*self.problems, Problem("", message, line)]
        return SpecError(f"{show_key(self.name)} cannot be read", problems=problems)

    def compose(self, text: str) -> _Node | None:
        """The only document's top node, or None when there is none."""
        if _FAST is not None and "\t" not in text:
            with contextlib.suppress(yaml.YAMLError, UnicodeEncodeError):
                return self._compose_document(yaml.parse(text, Loader=_FAST))
            self.problems, self.anchors, self.nodes = [], {}, 0
        try:
            return self._compose_document(yaml.parse(text, Loader=yaml.SafeLoader))
        except yaml.reader.ReaderError as error:
            line = text[: error.position].count("\n") + 1
            raise self.failure(f"not YAML: character {chr(error.character)!a} is not allowed", line) from error
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            words = " ".join(word for word in (error.context, error.problem) if word)
            raise self.failure(f"not YAML: {show_key(words)}", None if mark is None else mark.line + 1) from error
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            raise self.failure(f"not YAML: {show_key(str(error))}", None) from error

    def _compose_document(self, events: Iterator[Any]) -> _Node | None:
        top: _Node | None = None
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                if top is not None:
                    raise self.failure("holds a second document: one file is one job", _find_line(event))
                top = self._compose_node(next(events), events, depth=0)
        return top

    def _compose_node(self, event: Any, events: Iterator[Any], depth: int) -> _Node:
        line = _find_line(event)
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise self.failure(f"holds more than {MAX_NODES} values: that is no job spec", line)
        if depth > MAX_DEPTH:
            raise self.failure(f"is nested deeper than {MAX_DEPTH} levels", line)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                raise self.failure(f"alias *{event.anchor} stands before its anchor is complete", line)
            return self.anchors[event.anchor]
        if event.tag is not None and event.tag not in _STANDARD_TAGS:
            self.problems.append(
                Problem("", f"tag {show_key(event.tag)} is not supported: write the plain value", line)
            )
        if isinstance(event, yaml.ScalarEvent):
            node = _Node("value", line, self._read_scalar(event, line))
        elif isinstance(event, yaml.SequenceStartEvent):
            node = _Node("sequence", line, self._compose_items(events, depth))
        else:
            node = _Node("mapping", line, self._compose_pairs(events, depth))
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def _read_scalar(self, event: Any, line: int) -> Any:
        if event.style or event.tag is not None:  # a plain one's style is None, or empty from libyaml
            return event.value
        try:
            return resolve_plain(event.value)
        except ValueError as error:
            self.problems.append(Problem("", str(error), line))
            return 0

    def _compose_items(self, events: Iterator[Any], depth: int) -> list[_Node]:
        items = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            items.append(self._compose_node(event, events, depth + 1))
        return items

    def _compose_pairs(self, events: Iterator[Any], depth: int) -> list[tuple[Any, int, bool, _Node]]:
        pairs = []
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            key = self._compose_node(event, events, depth + 1)
            value = self._compose_node(next(events), events, depth + 1)
            merges = isinstance(event, yaml.ScalarEvent) and not event.style and event.value == "<<"
            pairs.append((key, _find_line(event), merges, value))
        return pairs

    def expand(self, node: _Node, path: KeyPath = ()) -> Any:
        """The node's value; aliases are written out, and every copy counts."""
        self.expanded += 1
        if self.expanded > MAX_NODES:
            raise self.failure(f"aliases write it out to more than {MAX_NODES} values", node.line)
        if len(path) > MAX_DEPTH:
            raise self.failure(f"is nested deeper than {MAX_DEPTH} levels", node.line)
        if node.kind == "sequence":
            for index, item in enumerate(node.content):
                self.lines.setdefault((*path, index), item.line)
            return [self.expand(item, (*path, index)) for index, item in enumerate(node.content)]
        if node.kind == "mapping":
            return self._expand_mapping(node, path)
        return node.content

    def _expand_mapping(self, node: _Node, path: KeyPath) -> dict[str, Any]:
        own: dict[str, Any] = {}
        for key_node, line, merges, value in node.content:
            key = key_node.content
            if merges:
                continue
            if key_node.kind != "value" or not isinstance(key, str):
                shown = show_value(key) if key_node.kind == "value" else f"a {key_node.kind}"
                self.problems.append(Problem(show_path(path), f"key {shown} is no text: put it in quotes", line))
            elif key in own:
                message = f"given twice (first on line {self.lines[(*path, key)]}): keep one"
                self.problems.append(Problem(show_path((*path, key)), message, line))
            else:
                self.lines.setdefault((*path, key), line)
                own[key] = self.expand(value, (*path, key))
        merged: dict[str, Any] = {}
        for _, line, merges, value in node.content:
            if merges:
                self._merge(merged, value, path, line)
        return {**{key: value for key, value in merged.items() if key not in own}, **own}

    def _merge(self, merged: dict[str, Any], value: _Node, path: KeyPath, line: int) -> None:
        """Adds what `<<` brings: of several sources the first one wins, and the mapping's own keys win over all."""
        for source in value.content if value.kind == "sequence" else [value]:
            if source.kind != "mapping":
                self.problems.append(Problem(show_path(path), "<< wants a mapping or a list of mappings", line))
                continue
            for key, content in self.expand(source, path).items():
                merged.setdefault(key, content)


def _find_line(event: Any) -> int:
    """1-based line of an event of PyYAML."""
    line: int = event.start_mark.line
    return line + 1


def show_path(path: KeyPath) -> str:
    """A key path as users write it: ("lora", "r") is lora.r."""
    return ".".join(show_key(str(part)) for part in path)
