"""The bytes of quantized weights against bitsandbytes itself, quantizing a layer on the CPU."""

from __future__ import annotations

from typing import Any

import pytest

from lora_jobs.sizing.models import find_shape
from lora_jobs.sizing.modules import list_modules
from lora_jobs.sizing.precision import choose_precision
from lora_jobs.sizing.state import weight_bytes
from lora_jobs.spec import parse_spec
from lora_jobs.spec.job import QuantizationSpec

pytestmark = pytest.mark.train

SPEC = """
name: q
model: {name_or_path: smollm2-135m, quantization: {load_in_4bit: true}}
lora: {r: 8}
data: {train: t.jsonl}
training: {max_steps: 1, bf16: true}
"""
TABLE_BYTES = 2048
"""At the most, the tables that values are looked up in; the estimate leaves them out."""


def quantize(kind: str, *, double: bool) -> int:
    """Bytes of an up_proj of SmolLM2 135M that bitsandbytes has quantized."""
    import torch
    from bitsandbytes import functional

    weight = torch.ones(1536, 576, dtype=torch.bfloat16)
    if kind == "int8":
        values, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        return int(values.nbytes + scales.nbytes)
    values, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=double)
    held: list[Any] = [values, *vars(state).values(), *(vars(state.state2).values() if state.nested else ())]
    return sum(part.nbytes for part in held if isinstance(part, torch.Tensor))


@pytest.mark.parametrize(
    ("kind", "double"), [("nf4", False), ("fp4", False), ("nf4", True), ("fp4", True), ("int8", False)]
)
def test_quantized_weights_take_what_bitsandbytes_takes(kind: str, double: bool) -> None:
    if kind == "int8":
        quantization = QuantizationSpec(load_in_8bit=True)
    else:
        quantization = QuantizationSpec(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
    module = next(module for module in list_modules(find_shape("smollm2-135m")) if module.leaf == "up_proj")
    expected = weight_bytes(module, choose_precision(parse_spec(SPEC, source="q")), quantization)
    assert 0 <= quantize(kind, double=double) - expected <= TABLE_BYTES
