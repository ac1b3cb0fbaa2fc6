"""Job specs for the sizing tests: one plain base, changed by dotted keys as --set would."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import pytest

from lora_jobs.spec.load import parse_spec, replace_values

if TYPE_CHECKING:
    from lora_jobs.spec.job import JobSpec

PLAIN = """
name: plain
model: {name_or_path: meta-llama/Llama-3.2-1B, attn_implementation: flash_attention_2}
lora: {r: 16, lora_dropout: 0.1}
data: {train: train.jsonl, max_length: 1024}
training: {trainer: transformers, max_steps: 10, bf16: true}
resources: {gpus_per_node: 1}
"""


class SpecMaker(Protocol):
    def __call__(self, changes: dict[str, Any] | None = None, /) -> JobSpec: ...


@pytest.fixture
def make_spec() -> SpecMaker:
    """A function from dotted keys to a spec: Llama 3.2 1B on one GPU, flash attention, the stock loss, one row."""

    def make(changes: dict[str, Any] | None = None, /) -> JobSpec:
        return replace_values(parse_spec(PLAIN, source="test"), changes or {})

    return make
