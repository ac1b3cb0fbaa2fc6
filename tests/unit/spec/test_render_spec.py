"""The stored copy of a spec loads back equal, whatever its texts look like; other YAML readers agree."""

from __future__ import annotations

import pytest
import yaml

from lora_jobs.spec import parse_spec, render_spec, replace_values
from lora_jobs.spec.render import render_values
from lora_jobs.spec.source import parse_source

GOOD = "name: a\nmodel: {name_or_path: b}\nlora: {r: 8}\ndata: {train: c}\ntraining: {max_steps: 5}\n"
TEXTS = [
    "1e-4", "1e4", "0o7", "0x1f", "010", "1_000", "24:00:00", "yes", "no", "on", "null", "~", "true", "-", "?", ": x",
    "# x", "a # b", "a: b", " lead", "trail ", "'", '"', "it's", "\\n", "$(id)", "`id`", "${HOME}", "%x", "@x", "&x",
    "*x", "!x", "|", ">", "{a}", "[a]", "é", "日本", "\U0001f600", "=", "<<", ".nan", ".inf", "+1", "1.", ".", "..",
    "../x", "-.5", "2026-01-01", "x" * 300, "a\u00a0b", "\ufeffx",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_texts_load_back_equal(text: str) -> None:
    spec = replace_values(parse_spec(GOOD, source="f"), {"model.name_or_path": text, "lora.modules_to_save": [text]})
    written = render_spec(spec)
    assert parse_spec(written, source="again") == spec
    assert yaml.safe_load(written) == spec.to_values()


@pytest.mark.parametrize(
    "text", ["a\nb", "a\n", "\na", "a\n\nb\n\n", " a\n  b", "a \nb", "\ttab\n", "a\n# b", "---\n", "'\n\""]
)
def test_instructions_of_several_lines_load_back_equal(text: str) -> None:
    spec = replace_values(parse_spec(GOOD, source="f"), {"data.instruction": text})
    assert parse_spec(render_spec(spec), source="again") == spec
    assert yaml.safe_load(render_spec(spec)) == spec.to_values()


@pytest.mark.parametrize("number", [1e-4, 1e-8, 5e-324, 1.7976931348623157e308, 0.1, 1e16, 123456789.123, 3.0])
def test_numbers_load_back_equal(number: float) -> None:
    assert parse_source(render_values({"x": number}), name="f").values == {"x": number}


def test_the_order_of_sections_is_the_spec_s() -> None:
    written = render_spec(parse_spec(GOOD + "deepspeed: {}\n", source="f"))
    sections = [line.partition(":")[0] for line in written.splitlines() if not line.startswith((" ", "-"))]
    assert sections == ["name", "model", "lora", "data", "training", "deepspeed", "resources", "resume", "sweep"]


def test_equal_lists_are_written_out_twice() -> None:
    same = ["a"]
    assert render_values({"x": same, "y": same}) == "x:\n- a\ny:\n- a\n"
