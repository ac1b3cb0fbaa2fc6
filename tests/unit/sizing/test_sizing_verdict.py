"""The verdict of `check`, its JSON, its warnings, and the promises of its suggestions."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from lora_jobs.errors import SpecError
from lora_jobs.sizing import cpu_device, find_gpu, size_job
from lora_jobs.spec import parse_spec, render_spec
from lora_jobs.units import GIB

if TYPE_CHECKING:
    from conftest import SpecMaker

    from lora_jobs.sizing import Gpu

GEMMA_SVG = {
    "model.name_or_path": "google/gemma-2-9b-it",
    "model.attn_implementation": None,
    "lora.r": 64,
    "lora.lora_alpha": 128,
    "lora.modules_to_save": ["embed_tokens", "lm_head"],
    "data.max_length": 2048,
    "data.eval": "eval.jsonl",
    "training.eval_steps": 10,
    "training.per_device_eval_batch_size": 8,
    "training.gradient_accumulation_steps": 16,
    "deepspeed.zero_stage": 2,
    "deepspeed.reduce_bucket_size": 500_000_000,
    "resources.gpus_per_node": 2,
}

# Each does not fit, for another reason.
TOO_LARGE: dict[str, tuple[dict[str, Any], str]] = {
    "logits of the evaluation": (GEMMA_SVG, "A100-64"),
    "trained embeddings": (GEMMA_SVG | {"training.trainer": "trl"}, "RTX4090"),
    "batch": ({"training.per_device_train_batch_size": 64}, "A100-40"),
    "no checkpointing": (
        {"training.activation_checkpointing": False, "training.trainer": "trl", "data.max_length": 32768},
        "L4",
    ),
    "eager scores": ({"model.attn_implementation": "eager", "data.max_length": 16384}, "A100-80"),
    "weights": ({"model.name_or_path": "google/gemma-2-27b", "model.attn_implementation": None}, "RTX3090"),
    "no DeepSpeed": (
        {"model.name_or_path": "llama-3.1-8b", "lora.modules_to_save": ["lm_head"], "resources.gpus_per_node": 4},
        "RTX4090",
    ),
    "fp32": (
        {"model.dtype": "float32", "training.bf16": False, "model.name_or_path": "llama-3.1-8b",
         "model.attn_implementation": "sdpa"},
        "L4",
    ),
    "adapter on lm_head": (
        {"lora.target_modules": ["q_proj", "lm_head"], "training.per_device_train_batch_size": 64}, "A100-40",
    ),
    "trained tokens": (
        {"lora.trainable_token_indices": [7], "training.per_device_train_batch_size": 64}, "A100-40",
    ),
    "much too small": ({"model.name_or_path": "google/gemma-2-27b", "model.attn_implementation": None}, "2080Ti"),
}  # fmt: skip


@pytest.mark.parametrize("case", TOO_LARGE)
def test_check_with_a_suggestion_set_gives_exactly_the_promised_peak(make_spec: SpecMaker, case: str) -> None:
    changes, name = TOO_LARGE[case]
    spec, gpu = make_spec(changes), find_gpu(name)
    verdict = size_job(spec, gpu)
    assert not verdict.fits
    assert verdict.suggestions
    for suggestion in verdict.suggestions:
        overrides = [f"{key}={json.dumps(value)}" for key, value in suggestion.set.items()]
        again = size_job(parse_spec(render_spec(spec), source="again", overrides=overrides), gpu)
        assert (again.estimate.peak_bytes, again.fits) == (suggestion.peak_bytes, suggestion.fits)
        assert suggestion.peak_bytes < verdict.estimate.peak_bytes


def test_suggestions_come_in_the_order_of_their_cost(make_spec: SpecMaker) -> None:
    verdict = size_job(make_spec(GEMMA_SVG), find_gpu("A100-64"))
    assert [list(suggestion.set) for suggestion in verdict.suggestions if suggestion.fits] == [
        ["training.trainer"],
        ["training.per_device_eval_batch_size"],
        ["lora.modules_to_save"],
        ["data.max_length"],
    ]
    assert verdict.smallest_gpu == "H100-80"


def test_trained_tokens_are_named_only_where_they_can_be_trained(make_spec: SpecMaker) -> None:
    """TRL's loss refuses them on a tied model, the stock one does not."""
    for trainer, named in (("trl", False), ("transformers", True)):
        verdict = size_job(make_spec(GEMMA_SVG | {"training.trainer": trainer}), find_gpu("RTX4090"))
        frozen = [each.why for each in verdict.suggestions if list(each.set) == ["lora.modules_to_save"]]
        assert ["trainable_token_indices" in why for why in frozen] == [named]


def test_changes_are_combined_where_none_is_enough(make_spec: SpecMaker) -> None:
    changes, name = TOO_LARGE["trained embeddings"]
    first, *others = size_job(make_spec(changes), find_gpu(name)).suggestions
    assert first.fits
    assert len(first.set) > 1
    assert first.why.startswith("together: ")
    assert not any(suggestion.fits for suggestion in others)


def test_nothing_is_suggested_to_a_job_that_fits(make_spec: SpecMaker) -> None:
    verdict = size_job(make_spec(), find_gpu("A100-64"))
    assert verdict.fits
    assert (verdict.suggestions, verdict.smallest_gpu, verdict.warnings) == ((), None, ())


def test_the_json_holds_the_stable_keys(make_spec: SpecMaker) -> None:
    gpu = find_gpu("A100-64")
    document = size_job(make_spec(GEMMA_SVG), gpu, warnings=["from outside"]).to_json()
    assert json.loads(json.dumps(document)) == document
    assert document["fits"] is False
    assert document["world_size"] == 2
    assert document["gpu"] == {"name": "A100-64", "memory_bytes": 64 * GIB, "usable_bytes": gpu.usable_bytes}
    assert document["parameters"] == {"base": 9_241_705_984, "trainable": 2_051_080_192}
    estimate = document["estimate"]
    assert document["attention"] == {"implementation": "eager", "kernel": "eager"}
    assert sum(estimate["components"].values()) == estimate["peak_bytes"] > estimate["allocated_peak_bytes"]
    assert estimate["binding_instant"] == "while an evaluation's loss is computed"
    assert estimate["instants"]["evaluation_loss"] == estimate["allocated_peak_bytes"]
    assert document["host_memory_bytes"] > 2 * 2 * 9_241_705_984
    assert document["checkpoint_bytes"] > 16 * 2_051_080_192
    assert document["problems"] == []
    assert document["warnings"][0] == "from outside"
    assert set(document["suggestions"][0]) == {"set", "peak_bytes", "fits", "verdict", "why"}


@pytest.mark.parametrize(
    ("changes", "gpu", "words"),
    [
        ({**GEMMA_SVG, "model.dtype": "float16", "training.bf16": False, "training.fp16": True}, "A100-64", "overflow"),
        (GEMMA_SVG, "A100-64", "breaks the tie"),
        ({"model.attn_implementation": "sdpa"}, "V100-16", "has no bfloat16"),
        ({"data.max_length": 200_000}, "H200", "beyond the 131072 positions"),
        ({}, "H100-80", "nobody measured the CUDA context of H100-80"),
        ({"resources.mem": "2G"}, "A100-64", "resources.mem asks for 2.0 GiB"),
        ({"model.name_or_path": "google/gemma-3-4b-it"}, "A100-64", "3,880,263,168 parameters) and its vision tower"),
        ({"lora.target_modules": ".*q_proj|.*kv_eins"}, "A100-64", "the alternative '.*kv_eins' matches no"),
        ({"model.name_or_path": "google/gemma-3-4b-it"}, "A100-64", "on 81 layers of the vision tower"),
    ],
)  # fmt: skip
def test_warnings(make_spec: SpecMaker, changes: dict[str, Any], gpu: str, words: str) -> None:
    assert [warning for warning in size_job(make_spec(changes), find_gpu(gpu)).warnings if words in warning]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora.target_modules": ["q_proj", "embed_tokens"]}, "an adapter on embed_tokens trains, but cannot be"),
        ({"lora.target_modules": ["q_proj", "lm_head"]}, "an adapter on lm_head trains, but cannot be merged"),
        ({"lora.target_modules": ["q_proj", "lm_head"], "lora.ensure_weight_tying": True},
         "an adapter on embed_tokens and lm_head trains"),
        ({"lora.target_modules": ["q_proj", "lm_head"], "lora.modules_to_save": ["embed_tokens"]}, None),
        ({"lora.target_modules": ["q_proj", "lm_head"], "model.name_or_path": "llama-3.1-8b"}, None),
        ({"lora.target_modules": "all-linear"}, None),
    ],
)  # fmt: skip
def test_an_adapter_on_tied_embeddings_is_warned_of(
    make_spec: SpecMaker, changes: dict[str, Any], words: str | None
) -> None:
    found = [each for each in size_job(make_spec(changes), find_gpu("A100-64")).warnings if "merged" in each]
    assert [words in each for each in found] == ([] if words is None else [True])


@pytest.mark.parametrize(
    ("changes", "gpu", "kernel", "words"),
    [
        ({}, "A100-64", "flash", "sdpa by default, its flash kernel"),
        ({}, "V100-16", "memory-efficient", "sdpa by default, its memory-efficient kernel"),
        ({"training.per_device_train_batch_size": 2}, "A100-64", "memory-efficient", None),
        ({"model.name_or_path": "gemma-3-1b"}, "A100-64", "flash and memory-efficient", None),
        ({"model.name_or_path": "phi-3-mini", "data.max_length": 4096}, "A100-64", "memory-efficient", None),
    ],
)
def test_sdpas_kernel_is_resolved_as_torch_does(
    make_spec: SpecMaker, changes: dict[str, Any], gpu: str, kernel: str, words: str | None
) -> None:
    found = size_job(make_spec({"model.attn_implementation": None, **changes}), find_gpu(gpu)).attention
    assert found is not None
    assert found.to_json() == {"implementation": "sdpa", "kernel": kernel}
    assert words in (None, found.words)


HALF = {"model.attn_implementation": "sdpa", "model.dtype": "float16", "training.bf16": False, "training.fp16": True}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora.bias": "all"},
        {"lora.modules_to_save": ["lm_head"], "model.dtype": "float32"},
        {"lora.modules_to_save": ["lm_head"], "deepspeed.zero_stage": 2},
        {"lora.modules_to_save": ["lm_head"], "model.quantization.load_in_4bit": True},
        {"lora.autocast_adapter_dtype": False, "training.fp16": False},
    ],
)
def test_fp16_is_taken_where_the_trained_weights_are_float32(make_spec: SpecMaker, changes: dict[str, Any]) -> None:
    """Llama 3.2 has no biases, so that bias: all trains none."""
    assert size_job(make_spec(HALF | changes), find_gpu("A100-64")).fits


def test_a_cpu_gets_a_number_and_a_caution(make_spec: SpecMaker) -> None:
    spec = make_spec({"model.attn_implementation": "sdpa", "model.dtype": "float32", "training.bf16": False})
    verdict = size_job(spec, cpu_device(64 * GIB))
    assert verdict.fits
    assert any("less sure" in warning for warning in verdict.warnings)
    assert not size_job(spec, cpu_device(4 * GIB)).fits


@pytest.mark.parametrize(
    ("changes", "gpu", "path"),
    [
        (
            {"model.name_or_path": "google/gemma-2-2b", "model.attn_implementation": "sdpa"},
            find_gpu("A100-64"),
            "model.attn_implementation",
        ),
        ({"training.trainer": "trl", "lora.target_modules": ["q_proj", "lm_head"]}, find_gpu("L4"),
         "lora.target_modules"),
        (
            {"training.trainer": "trl", "lora.trainable_token_indices": [7]}, find_gpu("L4"),
            "lora.trainable_token_indices",
        ),
        ({"model.name_or_path": "no/such-model"}, find_gpu("A100-64"), "model.name_or_path"),
        ({}, find_gpu("V100-16"), "model.attn_implementation"),
        ({}, cpu_device(64 * GIB), "model.attn_implementation"),
        (
            {"model.attn_implementation": "eager", "training.bf16": False, "training.fp16": True,
             "model.dtype": "float32"},
            cpu_device(64 * GIB),
            "training.fp16",
        ),
        (
            {"model.attn_implementation": "eager", "training.use_liger_kernel": True},
            cpu_device(64 * GIB),
            "training.use_liger_kernel",
        ),
        (HALF | {"lora.modules_to_save": ["lm_head"]}, find_gpu("A100-64"), "training.fp16"),
        (HALF | {"lora.autocast_adapter_dtype": False}, find_gpu("A100-64"), "training.fp16"),
        (HALF | {"model.name_or_path": "qwen2.5-7b", "lora.bias": "all"}, find_gpu("V100-16"), "training.fp16"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_before_it_is_sized(
    make_spec: SpecMaker, changes: dict[str, Any], gpu: Gpu, path: str
) -> None:
    with pytest.raises(SpecError) as caught:
        size_job(make_spec(changes), gpu)
    assert [problem.path for problem in caught.value.problems] == [path]
