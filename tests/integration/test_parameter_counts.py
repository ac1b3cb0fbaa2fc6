"""Counts, module names and target matching against the real transformers and PEFT, on torch's meta device."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import asdict, replace

from lora_jobs.sizing import MODELS, ModelShape, count_parameters, count_trainable, find_shape
from lora_jobs.sizing.modules import list_modules
from lora_jobs.sizing.targets import find_adapted, match_targets
from lora_jobs.spec.job import DEFAULT_TARGETS, LoraSpec

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.train

SEVEN = DEFAULT_TARGETS
HEAD_AND_EMBEDDING = ("embed_tokens", "lm_head")

# The stack warns about things that are not the subject here: PEFT about tied weights, torch about its own future.
FORGIVEN = "ignore"

VARIANTS: dict[str, dict[str, Any]] = {
    "r 64, all seven": {"r": 64, "target_modules": SEVEN},
    "q and v": {"r": 8, "target_modules": ("q_proj", "v_proj")},
    "rank patterns": {
        "r": 8, "target_modules": SEVEN,
        "rank_pattern": {r"layers\.1\.self_attn\.o_proj": 2, "o_proj": 32, "mlp.down_proj": 4},
    },
    "trained tokens": {"r": 8, "target_modules": SEVEN, "trainable_token_indices": (3, 5)},
    "regex": {
        "r": 16, "target_modules": r"model\.(language_model\.)?layers\.[0-2]\.(self_attn\.(q|k)|mlp\.down)_proj",
    },
    "all-linear": {"r": 4, "target_modules": "all-linear"},
    "DoRA": {"r": 8, "target_modules": ("q_proj", "down_proj"), "use_dora": True},
    "two layers": {"r": 8, "target_modules": ("q_proj", "up_proj"), "layers_to_transform": (0, 3)},
    "without names": {"r": 8, "target_modules": "all-linear", "exclude_modules": ("down_proj", "vision_tower")},
    "without an expression": {"r": 8, "target_modules": SEVEN, "exclude_modules": r".*(vision|mlp).*"},
    "JAX names": {
        "r": 4, "target_modules": r"(?!.*vision).*(q_einsum|kv_einsum|attn_vec_einsum|gate_proj|down_proj|up_proj)",
    },
    "all biases": {"r": 8, "target_modules": ("o_proj",), "bias": "all"},
    "biases of the adapted": {"r": 8, "target_modules": ("q_proj", "o_proj"), "bias": "lora_only"},
    "head and embedding saved": {"r": 64, "target_modules": SEVEN, "modules_to_save": HEAD_AND_EMBEDDING},
    "head and embedding saved, tied": {
        "r": 64, "target_modules": SEVEN, "modules_to_save": HEAD_AND_EMBEDDING, "ensure_weight_tying": True,
    },
    "embedding saved": {"r": 8, "target_modules": SEVEN, "modules_to_save": ("embed_tokens",)},
    "embedding saved, tied": {
        "r": 8, "target_modules": SEVEN, "modules_to_save": ("embed_tokens",), "ensure_weight_tying": True,
    },
    "head saved, tied": {
        "r": 8, "target_modules": SEVEN, "modules_to_save": ("lm_head",), "ensure_weight_tying": True,
    },
    "all-linear, MLP saved": {"r": 4, "target_modules": "all-linear", "modules_to_save": ("mlp",)},
    "norms saved": {"r": 4, "target_modules": ("q_proj",), "modules_to_save": ("norm",)},
    "adapters on embedding and head": {"r": 4, "target_modules": ("q_proj", "embed_tokens", "lm_head")},
    "adapter on the head, tied": {"r": 4, "target_modules": ("q_proj", "lm_head"), "ensure_weight_tying": True},
    "adapters by regex, tied": {
        "r": 4, "target_modules": r".*(q_proj|embed_tokens)", "ensure_weight_tying": True,
    },
    "adapters on embedding and head, tied": {
        "r": 4, "target_modules": ("q_proj", "embed_tokens", "lm_head"), "ensure_weight_tying": True,
    },
}  # fmt: skip


def build_config(shape: ModelShape) -> Any:
    from transformers import AutoConfig

    options: dict[str, Any] = {
        name: getattr(shape, name)
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "tie_word_embeddings", "max_position_embeddings",
        )
    }  # fmt: skip
    if shape.sliding_window is not None or shape.model_type == "mistral":
        options["sliding_window"] = shape.sliding_window
    if shape.model_type == "llama":
        options |= {"attention_bias": shape.attention_bias, "mlp_bias": shape.mlp_bias}
    if shape.model_type in ("qwen2", "phi3", "smollm3"):
        options.pop("head_dim")
    if shape.model_type == "phi3":
        options["rope_parameters"] = {"rope_type": "default", "partial_rotary_factor": shape.partial_rotary_factor}
    if shape.vision is None:
        return AutoConfig.for_model(shape.model_type, **options)
    vision = {**asdict(shape.vision), "num_attention_heads": 16, "vision_use_head": False}
    return AutoConfig.for_model("gemma3", text_config=options, vision_config=vision)


def build_model(shape: ModelShape) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(build_config(shape), dtype=torch.bfloat16)


def add_adapter(model: Any, lora: LoraSpec) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter(FORGIVEN)
        from peft import get_peft_model

        from lora_jobs.training.model import build_lora_config

        return get_peft_model(model, build_lora_config(lora))


@pytest.mark.parametrize("shape", MODELS, ids=lambda shape: shape.name)
def test_base_parameters_and_modules_are_those_of_transformers(shape: ModelShape) -> None:
    model = build_model(shape)
    assert count_parameters(shape) == sum(parameter.numel() for parameter in model.parameters())
    named = {name for name, _ in model.named_modules() if name}
    assert {module.name for module in list_modules(shape)} == named
    sizes = {
        name: sum(parameter.numel() for parameter in module.parameters(recurse=False))
        for name, module in model.named_modules()
    }
    assert {module.name: module.parameters for module in list_modules(shape)} == {name: sizes[name] for name in named}


# Four rows stand for the rest, with four layers each: tied with norms of heads, multimodal, untied with biases, Llama.
@pytest.mark.parametrize("name", ["gemma-3-270m", "gemma-3-4b", "qwen2.5-7b", "smollm2-135m"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_trainable_parameters_are_those_of_peft(name: str, variant: str) -> None:
    shape, lora = replace(find_shape(name), num_hidden_layers=4), LoraSpec(**VARIANTS[variant])
    model = add_adapter(build_model(shape), lora)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert count_trainable(shape, lora) == trainable
    if not lora.ensure_weight_tying:
        adapted = {
            key.removeprefix("base_model.model.") for key, module in model.named_modules() if hasattr(module, "lora_A")
        }
        assert {module.name for module in find_adapted(shape, lora)} == adapted


@pytest.mark.parametrize("shape", MODELS, ids=lambda shape: shape.name)
def test_every_row_trains_as_many_as_peft(shape: ModelShape) -> None:
    shape = replace(shape, num_hidden_layers=2)
    lora = LoraSpec(**VARIANTS["head and embedding saved"])
    model = add_adapter(build_model(shape), lora)
    assert count_trainable(shape, lora) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("shape", MODELS, ids=lambda shape: shape.name)
def test_a_saved_config_reads_back_as_the_row(shape: ModelShape, tmp_path: Path) -> None:
    build_config(shape).save_pretrained(tmp_path)
    read = find_shape(str(tmp_path))
    assert list_modules(read) == list_modules(shape)
    assert (read.tie_word_embeddings, read.sliding_window, read.max_position_embeddings) == (
        shape.tie_word_embeddings, shape.sliding_window, shape.max_position_embeddings,
    )  # fmt: skip
    assert count_parameters(read) == count_parameters(shape)


QWEN = {
    "vocab_size": 100, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 2,
}  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 64}


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "changes",
    [
        {**WINDOW, "max_window_layers": 3},
        {**WINDOW, "max_window_layers": 0},
        {**WINDOW, "max_window_layers": 5},
        WINDOW,
        {"use_sliding_window": True, "max_window_layers": 1},
        {**WINDOW, "sliding_window": None, "max_window_layers": 1},
        {"sliding_window": 64, "max_window_layers": 1},
    ],
)
def test_the_layers_that_slide_are_those_of_transformers(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **QWEN, **changes}))
    theirs = AutoConfig.from_pretrained(tmp_path)
    shape = find_shape(str(tmp_path))
    slides = [shape.slides(layer) for layer in range(5)]
    assert slides == [kind == "sliding_attention" for kind in theirs.layer_types]
    assert (shape.sliding_window, shape.mask_types) == ((theirs.sliding_window, 2) if any(slides) else (None, 1))
    theirs.save_pretrained(tmp_path)  # with layer_types, which the hub's files leave out
    read = find_shape(str(tmp_path))
    assert [read.slides(layer) for layer in range(5)] == slides


@pytest.mark.parametrize("variant", ["r 64, all seven", "all-linear", "rank patterns", "trained tokens"])
def test_fused_projections_are_adapted_as_peft_does(variant: str) -> None:
    shape, lora = replace(find_shape("phi-4-mini"), num_hidden_layers=2), LoraSpec(**VARIANTS[variant])
    model = add_adapter(build_model(shape), lora)
    assert count_trainable(shape, lora) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == len(match_targets(shape, lora.target_modules)) == 4 * 2


def test_gemma_3_4b_text_part_is_its_own_model() -> None:
    whole = find_shape("google/gemma-3-4b-it")
    text = replace(whole, vision=None)
    assert count_parameters(whole) == 4_300_079_472
    assert count_parameters(text) == sum(parameter.numel() for parameter in build_model(text).parameters())
    assert count_parameters(text) == 3_880_263_168
