"""The model of a spec on fake tensors: transformers' and PEFT's own classes, a few layers deep."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from msgspec.structs import asdict
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from lora_jobs.errors import SpecError
from lora_jobs.sizing import find_shape
from lora_jobs.training.model import add_adapter, first_line
from lora_jobs.training.trace.quantize import quantize_base

if TYPE_CHECKING:
    from lora_jobs.sizing import ModelShape
    from lora_jobs.spec import JobSpec

_SAME_NAMES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
    "max_position_embeddings",
)

MOST_LAYERS = 1000
"""More is a slip or an attack."""

_NO_HEAD_DIM = ("qwen2", "phi3", "smollm3")
"""Families whose configs have no head_dim: it is hidden_size / num_attention_heads."""


def load_config(name_or_path: str) -> Any:
    """transformers' config: of a local directory, else of a row of the model table."""
    directory = Path(name_or_path).expanduser()
    if not (directory / "config.json").is_file():
        return config_of(find_shape(name_or_path))
    try:
        config = AutoConfig.from_pretrained(str(directory))
        layers = text_config(config).num_hidden_layers
    except (OSError, StrictDataclassError, ValueError, TypeError, AttributeError, KeyError, ArithmeticError) as error:
        said = " ".join(str(error).split())[:300]
        raise SpecError(f"{directory / 'config.json'}: {said}") from error
    if not isinstance(layers, int) or not 1 <= layers <= MOST_LAYERS:
        message = f"num_hidden_layers is {layers!r}, wanted a whole number from 1 to {MOST_LAYERS:,}"
        raise SpecError(f"{directory / 'config.json'}: {message}")
    return config


def config_of(shape: ModelShape) -> Any:
    """The config that a row of the model table stands for."""
    options: dict[str, Any] = {name: getattr(shape, name) for name in _SAME_NAMES}
    if shape.model_type in _NO_HEAD_DIM:
        options.pop("head_dim")
    if shape.sliding_window is not None or shape.model_type == "mistral":
        options["sliding_window"] = shape.sliding_window
    if shape.model_type == "llama":
        options |= {"attention_bias": shape.attention_bias, "mlp_bias": shape.mlp_bias}
    if shape.model_type == "phi3":
        options["rope_parameters"] = {"rope_type": "default", "partial_rotary_factor": shape.partial_rotary_factor}
    if shape.vision is None:
        return AutoConfig.for_model(shape.model_type, **options)
    vision = {**asdict(shape.vision), "num_attention_heads": 16, "vision_use_head": False}
    return AutoConfig.for_model("gemma3", text_config=options, vision_config=vision)


_NO_ROPE = " without rotary embedding"
"""Marks such a layer's kind (SmolLM3 has them)."""


def text_config(config: Any) -> Any:
    """The text model's part of a config."""
    return config.get_text_config(decoder=True)


def layer_kinds(config: Any) -> list[str]:
    """What tells one layer from another (attention window, rotary embedding), in the order of the layers."""
    text = text_config(config)
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    ropes = getattr(text, "no_rope_layers", None)
    if not ropes:
        return list(kinds)
    return [kind if rope else f"{kind}{_NO_ROPE}" for kind, rope in zip(kinds, ropes, strict=True)]


def with_layers(config: Any, kinds: list[str]) -> Any:
    """The config with these layers instead."""
    changed = type(config).from_dict(config.to_dict())
    text = text_config(changed)
    text.num_hidden_layers = len(kinds)
    if getattr(text, "no_rope_layers", None):
        text.no_rope_layers = [int(not kind.endswith(_NO_ROPE)) for kind in kinds]
    if getattr(text, "layer_types", None):
        text.layer_types = [kind.removesuffix(_NO_ROPE) for kind in kinds]
    changed.use_cache = text.use_cache = False
    return changed


def build_model(spec: JobSpec, config: Any, *, random_weights: bool = False) -> Any:
    """Base and adapter as training has them when its first step begins; under DeepSpeed cast as its engine does.

    Call it under FakeTensorMode and torch.device("cuda"); on a real GPU ask for `random_weights`, made on the device.
    """
    if spec.training.use_liger_kernel:
        raise SpecError("training.use_liger_kernel: its kernels cannot be traced", hint="use check without --exact")
    _refuse_unpadding(spec)
    options = {"attn_implementation": spec.model.attn_implementation} if spec.model.attn_implementation else {}
    try:
        with nullcontext() if random_weights else no_init_weights():
            base = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, spec.model.dtype), **options)
        base.tie_weights()
        if spec.model.quantization is not None:
            base = quantize_base(base, spec, spec.model.quantization)
    except (ImportError, ValueError) as error:
        raise SpecError(f"model: {first_line(error)}") from error
    model = _adapt(base, spec)
    if spec.model.quantization is not None and spec.training.trainer == "trl" and not spec.training.fp16:
        _narrow_adapters(model)
    if spec.training.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    if spec.deepspeed is not None and casts_parameters(spec):
        model.to(torch.bfloat16 if spec.training.bf16 else torch.float16)
    return model


def _refuse_unpadding(spec: JobSpec) -> None:
    """Flash attention takes padding out and packed rows apart by what the data holds, which fake tensors have not."""
    rows = [spec.training.per_device_train_batch_size]
    rows += [spec.training.per_device_eval_batch_size] if spec.data.eval is not None else []
    padded = max(rows) > 1 or spec.data.packing or spec.data.pad_to_multiple_of is not None
    if spec.model.attn_implementation == "flash_attention_2" and padded:
        message = "model.attn_implementation: flash_attention_2 over padded or packed rows cannot be traced"
        raise SpecError(message, hint="use check without --exact")


def _narrow_adapters(model: Any) -> None:
    """SFTTrainer makes the adapters of a quantized model bfloat16. Source: trl/trainer/sft_trainer.py, 1.16.0."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_magnitude_vector" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)


def casts_parameters(spec: JobSpec) -> bool:
    """Whether DeepSpeed's engine casts every parameter to half precision."""
    zero = spec.deepspeed
    return zero is not None and not zero.torch_autocast and (spec.training.bf16 or spec.training.fp16)


def _adapt(base: Any, spec: JobSpec) -> Any:
    try:
        return add_adapter(base, spec, zero_stage=spec.deepspeed.zero_stage if spec.deepspeed else None)
    except SpecError as error:
        names = {name.rsplit(".", 1)[-1] for name, part in base.named_modules() if isinstance(part, torch.nn.Linear)}
        raise SpecError(str(error), hint=f"the model's linear layers are {', '.join(sorted(names))}") from error


def find_layers(model: Any, config: Any) -> list[Any]:
    """The decoder layers, first to last: the one list of modules with as many parts as the config says."""
    count = text_config(config).num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and "vision" not in name and len(module) == count:
            return list(module)
    raise SpecError(f"no list of {count} decoder layers in {type(model.get_base_model()).__name__}")
