"""What an earlier trace is found by: it must not be read back when anything that its numbers depend on has changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lora_jobs.spec import parse_spec
from lora_jobs.training.trace.cache import LIBRARIES, list_sources, trace_key

if TYPE_CHECKING:
    from pathlib import Path

SPEC = parse_spec(
    """
name: row
model: {name_or_path: llama-3.2-1b}
data: {train: train.jsonl}
lora: {r: 16}
training: {max_steps: 1, bf16: true}
""",
    source="test",
)
CONFIG = {"hidden_size": 64}
VERSIONS = {"torch": "2.13.0", "deepspeed": "0.19.8"}


def test_the_code_that_builds_the_adapter_is_among_the_sources() -> None:
    names = {"/".join(path.parts[-3:]) for path in list_sources()}
    assert {
        "lora_jobs/training/model.py",
        "lora_jobs/spec/targets.py",
        "lora_jobs/sizing/activations.py",
        "training/trace/step.py",
        "training/trace/fake_cuda.cpp",
    } <= names


def test_a_changed_line_of_a_source_is_another_trace(tmp_path: Path) -> None:
    source = tmp_path / "model.py"
    source.write_text("one\n")
    before = trace_key(SPEC, CONFIG, VERSIONS, [source])
    assert trace_key(SPEC, CONFIG, VERSIONS, [source]) == before
    source.write_text("two\n")
    assert trace_key(SPEC, CONFIG, VERSIONS, [source]) != before


@pytest.mark.parametrize("library", VERSIONS)
def test_another_version_of_a_library_is_another_trace(library: str) -> None:
    other = {**VERSIONS, library: "99"}
    assert trace_key(SPEC, CONFIG, other) != trace_key(SPEC, CONFIG, VERSIONS)
    assert library in LIBRARIES


def test_a_job_with_held_out_examples_is_another_trace() -> None:
    """They are evaluated before the first step, with training.eval_steps or without."""
    held_out = SPEC.model_copy(update={"data": SPEC.data.model_copy(update={"eval": "eval.jsonl"})})
    assert held_out.training.eval_steps is None
    assert trace_key(held_out, CONFIG, VERSIONS) != trace_key(SPEC, CONFIG, VERSIONS)
