"""bitsandbytes' 4-bit layers on fake tensors: its own classes and autograd functions over its own fake kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import prepare_model_for_kbit_training

from lora_jobs.errors import SpecError
from lora_jobs.training.model import build_quantization

if TYPE_CHECKING:
    from lora_jobs.spec import JobSpec


def quantize(base: Any, spec: JobSpec) -> Any:
    """The base model as from_pretrained and prepare_model_for_kbit_training leave it: linear layers in 4 bits but for
    the output, everything else in float32.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    settings = spec.model.quantization
    if settings is None or settings.load_in_8bit:
        raise SpecError("model.quantization.load_in_8bit: cannot be traced", hint="use check without --exact")
    options = build_quantization(settings)
    for name, module in list(base.named_modules()):
        if not isinstance(module, torch.nn.Linear) or name == "lm_head" or "vision" in name:
            continue
        layer = Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=options.bnb_4bit_compute_dtype,
            compress_statistics=options.bnb_4bit_use_double_quant,
            quant_type=options.bnb_4bit_quant_type,
            device="meta",
        )
        weight = Params4bit(
            torch.empty_like(module.weight, requires_grad=False),
            requires_grad=False,
            compress_statistics=options.bnb_4bit_use_double_quant,
            quant_type=options.bnb_4bit_quant_type,
            module=layer,
        )
        layer.weight = weight._quantize(module.weight.device)
        layer.bias = module.bias
        parent, _, leaf = name.rpartition(".")
        setattr(base.get_submodule(parent), leaf, layer)
    base.is_loaded_in_4bit = True
    return prepare_model_for_kbit_training(base, use_gradient_checkpointing=spec.training.activation_checkpointing)


def list_statistics(model: Any) -> list[torch.Tensor]:
    """The tensors that quantized weights keep beside themselves."""
    found = []
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            found += [value for value in vars(part).values() if isinstance(value, torch.Tensor)] if part else []
    return found
