"""The base model, its tokenizer and the LoRA adapter, from the spec."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed

from lora_jobs.errors import SpecError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lora_jobs.spec import JobSpec, LoraSpec, ModelSpec, QuantizationSpec


def load_tokenizer(model: ModelSpec) -> PreTrainedTokenizerBase:
    """The model's own tokenizer; without a padding token it pads with the end token (labels are masked apart)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.name_or_path, revision=model.revision or "main", trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise SpecError(
            f"model.name_or_path: no tokenizer at {model.name_or_path!r}: {first_line(error)}",
            hint="compute nodes are often offline: download the model on the login node first",
        ) from error
    if not tokenizer.is_fast:
        raise SpecError(
            f"model.name_or_path: {model.name_or_path!r} has no fast tokenizer",
            hint="convert it once with AutoTokenizer.from_pretrained(...).save_pretrained(...) where tokenizers can",
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base_model(model: ModelSpec, *, device: torch.device, activation_checkpointing: bool) -> PreTrainedModel:
    """The frozen base model in model.dtype; quantized by bitsandbytes, or with a device map, straight onto the device.

    The map names the process's one device: "auto" itself would leave what does not fit on the host, without a word.
    """
    options: dict[str, Any] = {"dtype": getattr(torch, model.dtype)}
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation
    if model.quantization is not None:
        options["quantization_config"] = build_quantization(model.quantization)
    if model.quantization is not None or model.device_map is not None:
        options["device_map"] = {"": device if device.type == "cuda" else "cpu"}
    try:
        base = AutoModelForCausalLM.from_pretrained(
            model.name_or_path,
            revision=model.revision or "main",
            trust_remote_code=model.trust_remote_code,
            **options,
        )
    except (OSError, ValueError) as error:
        raise SpecError(
            f"model.name_or_path: {model.name_or_path!r} does not load: {first_line(error)}",
            hint="compute nodes are often offline: download the model on the login node first",
        ) from error
    if model.quantization is not None:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=activation_checkpointing)
    return base


def build_quantization(quantization: QuantizationSpec) -> BitsAndBytesConfig:
    """bitsandbytes' settings as transformers takes them."""
    return BitsAndBytesConfig(
        load_in_4bit=quantization.load_in_4bit,
        load_in_8bit=quantization.load_in_8bit,
        bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=getattr(torch, quantization.bnb_4bit_compute_dtype),
    )


def build_lora_config(lora: LoraSpec) -> LoraConfig:
    """PEFT's LoraConfig, field by field."""
    alpha = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=_list_or_text(lora.targets),
        exclude_modules=_list_or_text(lora.exclude_modules),
        layers_to_transform=list(lora.layers_to_transform) or None,
        init_lora_weights=lora.init_lora_weights,
        modules_to_save=list(lora.modules_to_save) or None,
        bias=lora.bias,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        ensure_weight_tying=lora.ensure_weight_tying,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        trainable_token_indices=list(lora.trainable_token_indices) or None,
    )


def _list_or_text(names: tuple[str, ...] | str) -> list[str] | str | None:
    return names if isinstance(names, str) else list(names) or None


def add_adapter(base: PreTrainedModel, spec: JobSpec, *, zero_stage: int | None) -> PeftModel:
    """The base model with a fresh adapter: the same numbers in every rank and every attempt, by training.seed.

    ZeRO-3 gathers parameters of one dtype only, so there the adapter keeps the base's dtype instead of float32.
    """
    set_seed(spec.training.seed)
    uniform = zero_stage == 3 and spec.model.quantization is None
    autocast = spec.lora.autocast_adapter_dtype and not uniform
    try:
        return get_peft_model(base, build_lora_config(spec.lora), autocast_adapter_dtype=autocast)
    except ValueError as error:
        raise SpecError(f"lora: {first_line(error)}", hint="`lora-jobs check` names the modules that exist") from error


def widen_adapters(model: PeftModel) -> None:
    """What is trained, in float32: SFTTrainer makes the adapters of a quantized model bfloat16, which has no use for
    fp16's gradient scaler and is less exact.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()


def first_line(error: BaseException) -> str:
    """The first line of a library's message, at most 300 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
