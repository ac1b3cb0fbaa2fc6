"""A spec as YAML that loads back equal, under this project's reader and under any other."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from lora_jobs.spec.job import JobSpec


class _Dumper(yaml.SafeDumper):
    """PyYAML's writer, which quotes what YAML 1.1 would misread, made to quote what YAML 1.2 would, too."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


_NUMBER_OF_1_2 = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|0o[0-7]+|0x[0-9a-fA-F]+")
_Dumper.add_implicit_resolver("!number-of-yaml-1.2", _NUMBER_OF_1_2, list("-+.0123456789"))


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    if style is None and _NUMBER_OF_1_2.fullmatch(text):
        style = "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def render_values(values: Any) -> str:
    """Plain values as YAML, in their order."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return text


def render_spec(spec: JobSpec) -> str:
    """The whole spec, defaults written out, as YAML that loads back equal."""
    return "".join(_render_section(name, json.dumps(value)) for name, value in spec.to_values().items())


@lru_cache(maxsize=1024)
def _render_section(name: str, text: str) -> str:
    """One section as YAML, given as JSON. The tasks of a sweep share most sections, and of the others most lines."""
    section = json.loads(text)
    if not isinstance(section, dict) or not section:
        return render_values({name: section})
    return f"{name}:\n" + "".join(_render_value(name, key, json.dumps(value)) for key, value in section.items())


@lru_cache(maxsize=4096)
def _render_value(section: str, key: str, text: str) -> str:
    """The lines of one key of a section, its value given as JSON; without the end of the document that PyYAML writes
    after a text with empty last lines.
    """
    lines = render_values({section: {key: json.loads(text)}}).partition("\n")[2]
    return lines.removesuffix("...\n") if lines.endswith("\n...\n") else lines
