"""A first spec as commented YAML, and a value changed in it without losing the comments."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lora_jobs.resources import find_resource_directory
from lora_jobs.spec.source import resolve_plain

if TYPE_CHECKING:
    from collections.abc import Mapping

TEMPLATE = "spec.yaml.j2"
CHOSEN = "# so that it fits"
_PLAIN = re.compile(r"[A-Za-z0-9_./-]+", re.ASCII)


def render_starter(values: Mapping[str, Any]) -> str:
    """The spec with these values, each by the template's name for it; texts are quoted where YAML needs it."""
    quoted = {name: quote_scalar(value) if isinstance(value, str) else value for name, value in values.items()}
    return _templates().get_template(TEMPLATE).render(quoted)


def quote_scalar(text: str) -> str:
    """A text as one YAML scalar: plain where that means the same text ("null" does not), else in quotes."""
    plain = _PLAIN.fullmatch(text) is not None and text[0] not in "-." and resolve_plain(text) == text
    return text if plain else json.dumps(text, ensure_ascii=False)


def change_value(text: str, key: str, value: Any) -> str:
    """The spec's text with `section.field` set: its line replaced, or a line added to the section, or the section."""
    section, _, field = key.partition(".")
    line = f"  {field}: {json.dumps(value)}   {CHOSEN}"
    lines = text.splitlines()
    if f"{section}:" not in lines:
        return f"{text}\n{section}:\n{line}\n"
    start = lines.index(f"{section}:")
    end = next((at for at in range(start + 1, len(lines)) if lines[at] and not lines[at].startswith(" ")), len(lines))
    own = [at for at in range(start + 1, end) if lines[at].startswith(f"  {field}:")]
    if own:
        lines[own[0]] = line
    else:
        lines.insert(start + 1, line)
    return "\n".join(lines) + "\n"


@cache
def _templates() -> Environment:
    return Environment(
        loader=FileSystemLoader(find_resource_directory("templates")),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701  (YAML: quoted above)
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
