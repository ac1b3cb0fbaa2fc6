"""A report as HTML: one file, no script, nothing from the network. Every text is escaped by the template engine."""

from __future__ import annotations

import base64
import re
from functools import cache
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from msgspec import Struct

from lora_jobs.resources import find_resource_directory

if TYPE_CHECKING:
    from lora_jobs.rendering.charts import Chart, Tick

TEMPLATE = "report.html.j2"
GENERATOR = "lora-jobs report"
MOST_DRAWING_BYTES = 64 * 1024
_DRAWING = re.compile(r"<svg\b.*?</svg\s*>", re.DOTALL | re.IGNORECASE)
_NAMESPACE = "http://www.w3.org/2000/svg"


class Tile(Struct, frozen=True):
    """One figure of the summary; `tone` is good, bad, warn or nothing."""

    label: str
    value: str
    note: str = ""
    tone: str = ""


class Table(Struct, frozen=True):
    """Rows of text under column names; `tones` colours a row, by its number."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    tones: tuple[str, ...] = ()


class Bar(Struct, frozen=True):
    """A share of the estimate: percent of the largest."""

    name: str
    size: str
    percent: float


class Span(Struct, frozen=True):
    """One attempt on the time line, in percent of its length; `marks` are commits, `waited` the queue before it."""

    label: str
    words: str
    tone: str
    left: float
    width: float
    marks: tuple[float, ...] = ()
    waited: tuple[float, float] | None = None


class Timeline(Struct, frozen=True):
    """The attempts of a run over the clock."""

    spans: tuple[Span, ...]
    ticks: tuple[Tick, ...]
    caption: str


class Sample(Struct, frozen=True):
    """A held-out example, answered with and without the adapter."""

    prompt: str
    expected: str
    without_adapter: str
    with_adapter: str

    @property
    def drawing(self) -> str | None:
        """The SVG of the prompt as an image's address. In an image neither scripts nor links of an SVG do anything."""
        match = _DRAWING.search(self.prompt)
        if match is None or len(match[0]) > MOST_DRAWING_BYTES or "<!" in match[0]:
            return None
        text = match[0]
        if "xmlns=" not in text.partition(">")[0]:
            text = f'<svg xmlns="{_NAMESPACE}"{text[4:]}'
        return "data:image/svg+xml;base64," + base64.b64encode(text.encode("utf-8", "replace")).decode("ascii")


class Estimate(Struct, frozen=True):
    """What was predicted, part by part, beside what was measured."""

    verdict: str
    tone: str
    words: str
    bars: tuple[Bar, ...]
    measured: Table | None


class Text(Struct, frozen=True):
    """A long text that is folded away until it is asked for."""

    title: str
    body: str


class Page(Struct, frozen=True):
    """A whole report, ready to be laid out. `missing` says in words what is not there, and why."""

    title: str
    state: str
    tone: str
    explanation: str
    subtitle: str
    tiles: tuple[Tile, ...]
    targets: Table | None
    charts: tuple[Chart, ...]
    timeline: Timeline | None
    attempts: Table | None
    checkpoints: Table | None
    samples: tuple[Sample, ...]
    estimate: Estimate | None
    origin: tuple[tuple[str, str], ...]
    texts: tuple[Text, ...]
    missing: tuple[str, ...]
    footer: str


def render_page(page: Page) -> str:
    """The page as HTML."""
    return _templates().get_template(TEMPLATE).render(page=page, generator=GENERATOR)


@cache
def _templates() -> Environment:
    return Environment(
        loader=FileSystemLoader(find_resource_directory("templates")),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
