"""The first spec of a new user."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lora_jobs.errors import SpecError
from lora_jobs.resources import find_resource_directory
from lora_jobs.runs import write_atomic
from lora_jobs.spec import parse_spec
from lora_jobs.spec.source import resolve_plain
from lora_jobs.spec.words import NAME_PATTERN

if TYPE_CHECKING:
    from pathlib import Path


def init_spec(path: Path) -> Path:
    """Write a commented spec named after the file. Errors: SpecError when the file exists or the name is unusable."""
    if path.exists():
        raise SpecError(f"{path} exists already", hint="choose another name: nothing was changed")
    if re.fullmatch(NAME_PATTERN, path.stem) is None:
        wanted = "a letter, then letters, digits, dots, underscores or dashes, 64 at most"
        raise SpecError(f"{path.stem!r} is no name for a job: wanted {wanted}", hint="lora-jobs init my_job")
    text = (find_resource_directory("templates") / "spec.yaml").read_text(encoding="utf-8")
    # In quotes, where YAML would take the name for something else ("null").
    text = text.replace("NAME", path.stem if resolve_plain(path.stem) == path.stem else f'"{path.stem}"', 1)
    parse_spec(text, source=str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
    return path
