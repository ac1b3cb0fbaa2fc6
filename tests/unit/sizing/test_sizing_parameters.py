"""Trainable parameters and target matching, by hand (tests/integration compares them with PEFT itself)."""

from __future__ import annotations

from typing import Any

import pytest

from lora_jobs.errors import SpecError
from lora_jobs.sizing import count_trainable, find_shape, match_targets
from lora_jobs.sizing.targets import find_dead_alternatives
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


@pytest.mark.parametrize(
    ("pattern", "dead"),
    [
        (".*q_proj|.*kv_eins", (".*kv_eins",)),
        (".*q_einsum|.*kv_einsum|.*gate_proj", ()),
        (".*q_einsum|.*vk_einsum|.*gating", (".*vk_einsum", ".*gating")),
        (r".*(q_proj|nothing)|.*[|(]x|.*\|y", (r".*[|(]x", r".*\|y")),
        ("(?i).*Q_PROJ|.*nothing", ()),
        (r".*(q)_proj|.*nothing\1", ()),
        ("all-linear", ()),
        (("q_proj",), ()),
    ],
)
def test_alternatives_of_an_expression_that_match_nothing_are_found(
    pattern: tuple[str, ...] | str, dead: tuple[str, ...]
) -> None:
    assert find_dead_alternatives(find_shape(LLAMA), pattern) == dead


def test_the_default_adapts_every_projection_of_a_family_that_fuses_them() -> None:
    lora = LoraSpec(r=8)
    names = [module.leaf for module in match_targets(find_shape("phi-4-mini"), lora.target_modules)]
    assert names[:4] == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    assert len(names) == 4 * 32
    assert len(match_targets(find_shape(LLAMA), lora.target_modules)) == 7 * 16
    with pytest.raises(SpecError) as caught:
        match_targets(find_shape("phi-3-mini"), ("q_proj", "o_proj"))
    assert caught.value.message == "no layer of phi-3-mini is named q_proj; did you mean qkv_proj?"
    assert caught.value.hint == "its layers are qkv_proj, o_proj, gate_up_proj, down_proj, lm_head"


def test_patterns_of_ranks_are_those_of_peft() -> None:
    sides = {"q_proj": 2048 + 2048, "v_proj": 2048 + 512}
    lora = {"target_modules": ("q_proj", "v_proj"), "r": 8}
    plain = 8 * 16 * sum(sides.values())
    assert count(LLAMA, **lora) == plain
    assert count(LLAMA, **lora, rank_pattern={"q_proj": 32}) == plain + 24 * 16 * sides["q_proj"]
    # The first key that matches counts; a key is an expression over the end of a name.
    patterns = {r"layers\.(0|1)\.self_attn\.q_proj": 16, "q_proj": 4}
    assert count(LLAMA, **lora, rank_pattern=patterns) == plain + (2 * 8 - 14 * 4) * sides["q_proj"]


def test_trained_tokens_are_rows_of_the_embedding() -> None:
    plain = count(LLAMA, r=8)
    assert count(LLAMA, r=8, trainable_token_indices=(5, 7, 5)) == plain + 2 * 2048


def test_an_expression_that_backtracks_without_end_is_refused_in_time() -> None:
    with pytest.raises(SpecError, match="takes more than 1 s"):
        match_targets(find_shape(LLAMA), "(.*)*(.*)*(.*)*X")
    with pytest.raises(SpecError, match="takes more than 1 s"):
        count(LLAMA, r=8, rank_pattern={"(([a-z_.0-9])+.)+[A-Z]([a-z])+": 4})


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
        (
            {"target_modules": ("q_porj",), "modules_to_save": ("lm_head",)},
            "lora.target_modules",
            "did you mean q_proj?",
        ),
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
        ({"target_modules": ("q_proj", "v_prj")}, "lora.target_modules", "is named v_prj; did you mean v_proj?"),
        ({"rank_pattern": {"q_prj": 4}}, "lora.rank_pattern.q_prj", "'q_prj' matches no adapted layer"),
        ({"alpha_pattern": {"lm_head": 4}}, "lora.alpha_pattern.lm_head", "'lm_head' matches no adapted layer"),
        ({"rank_pattern": {"(": 4}}, "lora.rank_pattern.(", "'(' is not a regular expression"),
        ({"rank_pattern": {"k_proj": 600}}, "lora.rank_pattern", "r is 600, larger than the smallest side of"),
        ({"trainable_token_indices": (128256,)}, "lora.trainable_token_indices", "token 128256 is beyond"),
        (
            {"trainable_token_indices": (1,), "modules_to_save": ("embed_tokens",)},
            "lora.trainable_token_indices",
            "embed_tokens is in modules_to_save already",
        ),
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
