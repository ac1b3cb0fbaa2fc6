from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from lora_jobs.training.demo import SVG_CHARACTERS, describe_icon, make_once, write_drawings

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("label", "terms", "style", "caption"),
    [
        ("Check", ["Mark", "accept", "agree", "ok"], "solid", "A solid icon of Check, for mark, accept and agree."),
        ("Clone", [" copy", "clone", "copy"], "regular", "An outlined icon of Clone, for copy."),
        ("Minus", [], "solid", "A solid icon of Minus."),
    ],
)  # fmt: skip
def test_a_caption_is_made_of_label_and_terms(label: str, terms: list[str], style: str, caption: str) -> None:
    assert describe_icon(label, terms, style) == caption


def test_short_drawings_are_split_by_name(tmp_path: Path) -> None:
    def icon(label: str, **drawings: str) -> dict[str, object]:
        styles = {style: {"raw": raw} for style, raw in drawings.items()}
        return {"label": label, "search": {"terms": []}, "svg": styles}

    icons = {
        "check": icon("Check", solid="<svg>1</svg>", regular="<svg>2</svg>"),
        "minus": icon("Minus", solid="<svg>3</svg>"),
        "long": icon("Long", solid="x" * (SVG_CHARACTERS + 1)),
        "a": icon("A", solid="<svg>4</svg>"),
        "brand": icon("Brand", brands="<svg>5</svg>"),
    }
    metadata = tmp_path / "package/static/fontawesomefree/metadata"
    metadata.mkdir(parents=True)
    (metadata / "icons.json").write_text(json.dumps(icons))
    (tmp_path / "out").mkdir()
    write_drawings(tmp_path / "package", tmp_path / "out", "6.6.0")
    parts = {
        part: [json.loads(line) for line in (tmp_path / "out" / f"{part}.jsonl").read_text().splitlines()]
        for part in ("train", "eval")
    }
    assert parts == {
        "train": [{"svg": "<svg>3</svg>", "caption": "A solid icon of Minus."}],
        "eval": [
            {"svg": "<svg>2</svg>", "caption": "An outlined icon of Check."},
            {"svg": "<svg>1</svg>", "caption": "A solid icon of Check."},
        ],
    }
    assert "CC BY 4.0" in (tmp_path / "out" / "NOTICE").read_text()


def test_what_is_made_is_made_once_and_again_by_another_recipe(tmp_path: Path) -> None:
    made = []

    def make() -> str:
        made.append(1)
        return "made"

    directory = tmp_path / "data"
    assert [make_once(directory, {"recipe": number}, make) for number in (1, 1, 2)] == [True, False, True]
    assert len(made) == 2


def test_a_failed_making_leaves_no_mark(tmp_path: Path) -> None:
    def fail() -> str:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        make_once(tmp_path / "data", {"recipe": 1}, fail)
    assert make_once(tmp_path / "data", {"recipe": 1}, lambda: "made")
