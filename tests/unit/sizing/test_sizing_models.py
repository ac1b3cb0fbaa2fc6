"""Models by name, and from the config.json of a directory."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from lora_jobs.errors import SpecError
from lora_jobs.sizing import MODELS, count_parameters, find_shape
from lora_jobs.sizing.models import UnknownModelError

if TYPE_CHECKING:
    from pathlib import Path

# As the model cards and the safetensors indexes of the hub have them.
PUBLISHED = {
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 4_300_079_472,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen2.5-7b": 7_615_616_512,
    "mistral-7b-v0.3": 7_248_023_552,
    "smollm2-135m": 134_515_008,
    "gemma-3-12b": 12_187_325_040,
    "gemma-3-27b": 27_432_406_640,
    "llama-3.3-70b": 70_553_706_496,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "phi-3-mini": 3_821_079_552,
    "phi-4-mini": 3_836_021_760,
    "mistral-nemo": 12_247_782_400,
    "mistral-small-22b": 22_247_282_688,
    "mistral-small-24b": 23_572_403_200,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
}

# The keys that google/gemma-3-4b-it's own config.json leaves out are left out here too.
GEMMA_3_4B = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    },
}

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}

WINDOW = {"use_sliding_window": True, "sliding_window": 64}


def write_config(directory: Path, config: Any) -> str:
    (directory / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return str(directory)


def test_every_row_has_its_published_number_of_parameters() -> None:
    assert {shape.name: count_parameters(shape) for shape in MODELS} == PUBLISHED


@pytest.mark.parametrize("shape", MODELS, ids=lambda shape: shape.name)
def test_a_row_is_found_by_every_name_it_has(shape: Any) -> None:
    assert [find_shape(name) for name in (shape.name, shape.name.upper(), *shape.hub_ids)] == [shape] * (
        2 + len(shape.hub_ids)
    )


def test_an_unknown_model_says_what_is_known_and_what_was_meant() -> None:
    with pytest.raises(SpecError) as caught:
        find_shape("google/gemma-2-9b-its")
    error = caught.value
    assert error.problems[0].path == "model.name_or_path"
    assert error.message.endswith("did you mean google/gemma-2-9b-it?")
    assert "lora-jobs models" in (error.hint or "")
    assert "smollm3" in (error.hint or "")


@pytest.mark.parametrize("name", ["", "\0", "no/such/model", "x" * 5000, "../../etc"])
def test_strange_names_are_errors_in_words(name: str) -> None:
    with pytest.raises(SpecError):
        find_shape(name)


def test_a_config_is_counted_by_hand(tmp_path: Path) -> None:
    # embedding 100*8; per layer q, o 8*8, k, v 8*4 (head_dim 8/4 = 2), MLP 3*8*16, norms 2*8; final norm 8
    shape = find_shape(write_config(tmp_path, LLAMA))
    assert count_parameters(shape) == 800 + 2 * (2 * 64 + 2 * 32 + 3 * 128 + 16) + 8
    untied = find_shape(write_config(tmp_path, LLAMA | {"tie_word_embeddings": False, "attention_bias": True}))
    assert count_parameters(untied) == count_parameters(shape) + 800 + 2 * (8 + 4 + 4 + 8)


def test_defaults_stand_for_the_keys_that_hub_configs_leave_out(tmp_path: Path) -> None:
    assert count_parameters(find_shape(write_config(tmp_path, GEMMA_3_4B))) == PUBLISHED["gemma-3-4b"]
    config = {"model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 8}
    assert count_parameters(find_shape(write_config(tmp_path, config))) == PUBLISHED["gemma-2-9b"]


def test_a_window_that_is_null_is_no_window(tmp_path: Path) -> None:
    mistral = LLAMA | {"model_type": "mistral"}
    assert find_shape(write_config(tmp_path, mistral)).sliding_window == 4096
    assert find_shape(write_config(tmp_path, mistral | {"sliding_window": None})).sliding_window is None


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("", "is not JSON"),
        ("[1]", "holds a list"),
        ("[" * 100_000, "is not JSON"),
        ("{}" + " " * 1024**2, "is larger than"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2', wanted one of gemma2"),
        ({}, "model_type is None"),
        ({"model_type": ["llama"]}, "model_type is ['llama']"),
        ({"model_type": "gemma3"}, "text_config or vision_config is missing"),
        (LLAMA | {"quantization_config": {"quant_method": "gptq"}}, "is quantized already"),
        ({**LLAMA, "hidden_size": None}, "hidden_size is missing"),
        ({**LLAMA, "vocab_size": -1}, "vocab_size is -1, wanted a whole number from 1 to 10,000,000"),
        ({**LLAMA, "vocab_size": 10**30}, "wanted a whole number from 1 to 10,000,000"),
        ({**LLAMA, "num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({**LLAMA, "num_hidden_layers": True}, "num_hidden_layers is True"),
        ({**LLAMA, "num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
        ({**LLAMA, "intermediate_size": "16"}, "intermediate_size is '16'"),
        ({**LLAMA, "num_attention_heads": 16}, "hidden_size (8) is not a multiple of num_attention_heads (16)"),
        ({**LLAMA, "num_attention_heads": 3}, "hidden_size (8) is not a multiple of num_attention_heads (3)"),
        ({**LLAMA, "num_hidden_layers": 10**18}, "wanted a whole number from 1 to 1,000"),
        ({**LLAMA, "num_hidden_layers": -3}, "num_hidden_layers is -3"),
        ({**LLAMA, "hidden_size": "8"}, "hidden_size is '8'"),
        ({**LLAMA, "head_dim": 3}, "head_dim is 3: rotary embeddings need an even one"),
        ({**LLAMA, "partial_rotary_factor": "half"}, "partial_rotary_factor is 'half'"),
        (LLAMA | WINDOW | {"model_type": "smollm3"}, "use_sliding_window is true: which layers slide is not known"),
        (LLAMA | WINDOW | {"model_type": "qwen2", "max_window_layers": -1}, "max_window_layers is -1, wanted a whole"),
        (LLAMA | WINDOW | {"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types is not what"),
        ({**LLAMA, "num_key_value_heads": 3}, "num_attention_heads (4) is not a multiple of num_key_value_heads (3)"),
        ({**LLAMA, "tie_word_embeddings": 1}, "tie_word_embeddings is 1, wanted true or false"),
    ],
)
def test_a_bad_config_is_one_clear_error(tmp_path: Path, config: Any, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        find_shape(write_config(tmp_path, config))
    assert words in caught.value.message
    assert caught.value.message.startswith(str(tmp_path / "config.json"))
    assert caught.value.problems[0].path == "model.name_or_path"


@pytest.mark.parametrize("config", [{"model_type": "gpt_neox"}, {"model_type": "opt"}])
def test_another_family_is_pointed_to_the_trace(tmp_path: Path, config: Any) -> None:
    with pytest.raises(UnknownModelError) as caught:
        find_shape(write_config(tmp_path, config))
    assert "check --exact" in (caught.value.hint or "")


def test_partial_rotation_is_read_from_either_place(tmp_path: Path) -> None:
    phi = LLAMA | {"model_type": "phi3", "num_attention_heads": 2, "num_key_value_heads": 1}
    beside = find_shape(write_config(tmp_path, phi | {"partial_rotary_factor": 0.5}))
    within = find_shape(write_config(tmp_path, phi | {"rope_parameters": {"partial_rotary_factor": 0.5}}))
    assert beside == within
    assert beside.rotary_dim == 2


def test_a_directory_without_a_config_says_so(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"config\.json: is missing: not the directory of a transformers model"):
        find_shape(str(tmp_path))
