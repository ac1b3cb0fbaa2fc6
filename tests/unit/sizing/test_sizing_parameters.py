"""Trainable parameters and target matching, by hand (tests/integration compares them with PEFT itself)."""

from __future__ import annotations

from typing import Any

import pytest

from lora_jobs.errors import SpecError
from lora_jobs.sizing import count_trainable, find_shape, match_targets
from lora_jobs.spec.job import LoraSpec

LLAMA = "meta-llama/Llama-3.2-1B"
GEMMA = "google/gemma-2-9b-it"


def count(model: str, **lora: Any) -> int:
    return count_trainable(find_shape(model), LoraSpec(**lora))


def test_gemma_2_9b_with_r_64_on_all_seven_trains_216_million() -> None:
    # per layer: q 3584+4096, k and v 3584+2048, o 4096+3584, gate and up 3584+14336, down 14336+3584
    sides = 2 * (3584 + 4096) + 2 * (3584 + 2048) + 3 * (3584 + 14336)
    assert count(GEMMA, r=64) == 64 * 42 * sides == 216_072_192
    embedding = 256_000 * 3584
    saved = ("embed_tokens", "lm_head")
    assert count(GEMMA, r=64, modules_to_save=saved) == 216_072_192 + 2 * embedding == 2_051_080_192
    assert count(GEMMA, r=64, modules_to_save=saved, ensure_weight_tying=True) == 216_072_192 + embedding


def test_list_string_and_all_linear_match_as_peft_does() -> None:
    shape = find_shape(LLAMA)
    names = [module.name for module in match_targets(shape, ("q_proj", "mlp.up_proj"))]
    assert names[:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]
    assert len(names) == 2 * 16
    only = [module.name for module in match_targets(shape, r"model\.layers\.(0|15)\.self_attn\.v_proj")]
    assert only == ["model.layers.0.self_attn.v_proj", "model.layers.15.self_attn.v_proj"]
    assert len(match_targets(shape, "all-linear")) == 7 * 16
    assert len(match_targets(shape, ".*_proj|lm_head")) == 7 * 16 + 1


def test_modules_to_save_get_no_adapter() -> None:
    with_mlp = count(LLAMA, r=8, modules_to_save=("mlp",))
    attention_only = count(LLAMA, r=8, target_modules=("q_proj", "k_proj", "v_proj", "o_proj"))
    assert with_mlp == attention_only + 16 * 3 * 2048 * 8192


def test_dora_and_biases() -> None:
    plain = count(LLAMA, r=8, target_modules=("q_proj",))
    assert count(LLAMA, r=8, target_modules=("q_proj",), use_dora=True) == plain + 16 * 2048
    qwen = count("qwen2.5-7b", r=8, target_modules=("q_proj",))
    assert count("qwen2.5-7b", r=8, target_modules=("q_proj",), bias="lora_only") == qwen + 28 * 3584
    assert count("qwen2.5-7b", r=8, target_modules=("q_proj",), bias="all") == qwen + 28 * (3584 + 2 * 512)


@pytest.mark.parametrize(
    ("lora", "path", "words"),
    [
        ({"target_modules": ("q_porj",)}, "lora.target_modules", "did you mean q_proj?"),
        ({"target_modules": ("proj",)}, "lora.target_modules", "no layer of llama-3.2-1b is named proj"),
        (
            {"target_modules": "q_proj"},
            "lora.target_modules",
            "no layer of llama-3.2-1b matches target_modules 'q_proj'",
        ),
        ({"target_modules": ".*"}, "lora.target_modules", "also matches model, which is not a linear layer"),
        ({"target_modules": ("mlp",)}, "lora.target_modules", "also matches model.layers.0.mlp, which is not"),
        ({"target_modules": ("lm_head",), "modules_to_save": ("lm_head",)}, "lora.target_modules", "get no adapter"),
        ({"modules_to_save": ("embeddings",)}, "lora.modules_to_save", "no module of llama-3.2-1b is named"),
        (
            {"r": 513},
            "lora.r",
            "r is 513, larger than the smallest side of model.layers.0.self_attn.k_proj (2048 x 512)",
        ),
    ],
)
def test_what_peft_would_refuse_or_ignore_is_a_clear_error(lora: dict[str, Any], path: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        count(LLAMA, **({"r": 8} | lora))
    assert words in caught.value.message
    assert [problem.path for problem in caught.value.problems] == [path]
    assert caught.value.hint
