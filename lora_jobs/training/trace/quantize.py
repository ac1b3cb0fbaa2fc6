"""bitsandbytes' own layers on fake tensors: every linear layer of the base in 4 or 8 bits, as transformers loads it.

Imported without bitsandbytes, too, which only a quantized job needs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from peft import prepare_model_for_kbit_training
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert

from lora_jobs.training.model import build_quantization

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_jobs.spec import JobSpec, QuantizationSpec


QUANTILES = 256
"""Entries of the table that 8-bit values are looked up in."""


def quantize_base(base: Any, spec: JobSpec, quantization: QuantizationSpec) -> Any:
    """The base with quantized layers, prepared for training as `load_base_model` does it."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    config = build_quantization(quantization)
    weights = {name: part.weight for name, part in base.named_modules() if isinstance(part, torch.nn.Linear)}
    biases = {name: part.bias for name, part in base.named_modules() if isinstance(part, torch.nn.Linear)}
    with unset_fake_temporarily():  # its parameters are subclasses, which cannot hold a fake tensor
        replace_with_bnb_linear(base, get_keys_to_not_convert(base), config)
    for name, module in base.named_modules():
        if isinstance(module, Linear4bit | Linear8bitLt):
            _fill(module, weights.pop(name), quantization)
            module.bias = biases[name]
    base.is_loaded_in_4bit, base.is_loaded_in_8bit = quantization.load_in_4bit, quantization.load_in_8bit
    return prepare_model_for_kbit_training(base, use_gradient_checkpointing=spec.training.activation_checkpointing)


def _fill(module: Any, weight: torch.Tensor, quantization: QuantizationSpec) -> None:
    """Quantize one weight. A plain parameter stands for Params4bit and Int8Params, which cannot hold a fake tensor."""
    from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit

    if quantization.load_in_4bit:
        data, state = quantize_4bit(
            weight, compress_statistics=module.weight.compress_statistics, quant_type=module.weight.quant_type
        )
        extras = {"quant_state": state, **_copied(module.weight, "compress_statistics", "quant_type", "blocksize")}
    else:
        data, scales, _ = int8_vectorwise_quant(weight.to(torch.float16))
        extras = {"CB": data, "SCB": scales, "has_fp16_weights": False}
    module.weight = torch.nn.Parameter(data, requires_grad=False)
    for name, value in extras.items():
        setattr(module.weight, name, value)


def _copied(source: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(source, name) for name in names}


def count_elements(parameter: torch.Tensor) -> int:
    """Elements of a parameter: two of a 4-bit weight share a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def list_state(model: Any) -> list[torch.Tensor]:
    """The tensors of quantized weights that are no parameters: what their scales are kept in."""
    found: list[torch.Tensor | None] = []
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            found += [state.absmax, state.code, state.offset]
            found += [state.state2.absmax] if state.state2 is not None else []
        found.append(getattr(parameter, "SCB", None))
    return [tensor for tensor in found if tensor is not None]


def temporary_bytes() -> dict[Any, Callable[..., int]]:
    """What bitsandbytes' CUDA kernels allocate and free inside one operation, by the operation. No kernel runs on fake
    tensors, so the books cannot see it. Source: bitsandbytes/backends/cuda/ops.py, 0.50.2.
    """
    operations = torch.ops.bitsandbytes
    return {
        operations.gemm_4bit.default: _dequantized_bytes,
        operations.int8_vectorwise_quant.default: _outlier_bytes,
        operations.int8_mixed_scaled_mm.default: _product_bytes,
    }


def _dequantized_bytes(inputs: torch.Tensor, _packed: Any, shape: list[int], *_: Any, **options: Any) -> int:
    """A batch of training: the whole weight in the inputs' dtype, and its scales where they are quantized."""
    scales = 4 * math.prod(shape) // 64 if options.get("absmax_8bit") is not None else 0
    return math.prod(shape) * inputs.element_size() + scales


def _outlier_bytes(values: torch.Tensor, threshold: float = 0.0) -> int:
    """The search for outliers: absolute values, and where they are large."""
    return values.numel() * (values.element_size() + 1) if threshold else 0


def _product_bytes(inputs: torch.Tensor, _rows: Any, weight: torch.Tensor, *_: Any, **__: Any) -> int:
    """The product in 32-bit integers before it is scaled, and as float16 where another dtype is wanted."""
    width = 4 if inputs.dtype == torch.float16 else 4 + 2
    return width * math.prod(inputs.shape[:-1]) * weight.shape[0]


def install_rules() -> None:
    """Tell fake tensors that no column of an input is an outlier (how many there are is the data's), and give the table
    that 8-bit values are looked up in, which is computed value by value.
    """
    from bitsandbytes import functional

    functional.create_dynamic_map = lambda *_, **__: torch.zeros(QUANTILES)
    torch.library.register_fake("bitsandbytes::int8_vectorwise_quant", _quantize_rows, allow_override=True)
    torch.library.register_fake("bitsandbytes::int8_mixed_scaled_mm", _multiply, allow_override=True)


def _quantize_rows(values: torch.Tensor, threshold: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, Any]:
    rows = torch.empty(values.shape, device=values.device, dtype=torch.int8)
    scales = torch.empty(values.numel() // values.shape[-1], device=values.device, dtype=torch.float32)
    return rows, scales, values.new_empty(0, dtype=torch.int64) if threshold else None


def _multiply(
    inputs: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return inputs.new_empty((*rows.shape[:-1], weight.shape[0])), inputs.new_empty(0)
