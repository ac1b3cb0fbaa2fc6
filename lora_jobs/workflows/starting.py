"""The first spec of a new user."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_jobs.errors import SpecError
from lora_jobs.resources import find_resource_directory
from lora_jobs.runs import write_atomic
from lora_jobs.spec import parse_spec

if TYPE_CHECKING:
    from pathlib import Path


def init_spec(path: Path) -> Path:
    """Write a commented spec named after the file. Errors: SpecError when the file exists or the name is unusable."""
    if path.exists():
        raise SpecError(f"{path} exists already", hint="choose another name: nothing was changed")
    text = (find_resource_directory("templates") / "spec.yaml").read_text(encoding="utf-8")
    text = text.replace("NAME", path.stem, 1)
    parse_spec(text, source=str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
    return path
