"""The README.md of an exported model: the hub's metadata, then what it is, in Markdown."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from msgspec import Struct

from lora_jobs.resources import find_resource_directory
from lora_jobs.spec.render import render_values

TEMPLATE = "model_card.md.j2"


class Card(Struct, frozen=True):
    """What a model card says; `facts`, `results` are rows of text, `sample` an example answered with and without."""

    title: str
    merged: bool
    base_model: str
    is_on_hub: bool
    datasets: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    results: tuple[tuple[str, str, str, str], ...]
    sample: tuple[tuple[str, str], ...]
    spec: str
    versions: tuple[str, ...]


def render_card(card: Card) -> str:
    """The card as Markdown. Texts of a run stand in code, where Markdown and HTML mean nothing."""
    metadata: dict[str, Any] = {"library_name": "transformers" if card.merged else "peft"}
    if card.is_on_hub:
        metadata["base_model"] = card.base_model
    if card.datasets:
        metadata["datasets"] = list(card.datasets)
    metadata |= {"pipeline_tag": "text-generation", "tags": ["lora", "lora-jobs"]}
    return _templates().get_template(TEMPLATE).render(card=card, metadata=render_values(metadata))


def quote_code(text: str) -> str:
    """One line as a code span that nothing in it can end."""
    line = " ".join(text.split())
    fence = "`" * (max((len(ticks) for ticks in re.findall("`+", line)), default=0) + 1)
    padded = f" {line} " if line.startswith("`") or line.endswith("`") else line
    return f"{fence}{padded}{fence}" if line else ""


def quote_block(text: str) -> str:
    """Lines as an indented code block: no fence that a line of it could end."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def quote_cell(text: str) -> str:
    """One cell of a table, as code; a bar would end it."""
    return quote_code(text).replace("|", "\\|")


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(find_resource_directory("templates")),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701  (Markdown: quoted as code below)
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": quote_code, "block": quote_block, "cell": quote_cell}
    return environment
