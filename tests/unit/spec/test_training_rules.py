"""Settings of training that exclude each other, and names of layers from other frameworks."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lora_jobs.errors import SpecError
from lora_jobs.spec import JobSpec, find_translations, parse_spec, replace_values, translate_targets

TEXT = """
name: rules
model: {name_or_path: org/model}
lora: {r: 8}
data: {train: train.jsonl, eval: eval.jsonl}
training: {max_steps: 3}
"""


def build(changes: dict[str, Any]) -> JobSpec:
    return replace_values(parse_spec(TEXT, source="f"), changes)


@pytest.mark.parametrize(
    ("changes", "path", "words"),
    [
        (
            {"deepspeed.zero_stage": 3, "model.quantization.load_in_4bit": True},
            "deepspeed.zero_stage",
            "loads no bitsandbytes weights under ZeRO-3; use 2",
        ),
        ({"deepspeed.torch_autocast": True}, "deepspeed.torch_autocast", "needs training.bf16: true"),
        ({"training.use_liger_kernel": True}, "training.use_liger_kernel", "needs training.trainer: transformers"),
        (
            {"model.attn_implementation": "flash_attention_2", "model.dtype": "float32"},
            "model.attn_implementation",
            "bf16 or fp16 only",
        ),
        (
            {"lora.layers_to_transform": [0], "lora.target_modules": ".*q_proj"},
            "lora.layers_to_transform",
            "a list of names",
        ),
        ({"lora.init_lora_weights": "orthogonal", "lora.r": 3}, "lora.init_lora_weights", "an even r, which is 3"),
        ({"model.low_cpu_mem_usage": False}, "model.low_cpu_mem_usage", "knows no other way of loading"),
        (
            {"model.device_map": "auto", "resources.gpus_per_node": 2},
            "model.device_map",
            "for one process without DeepSpeed",
        ),
        ({"model.device_map": "auto", "deepspeed.zero_stage": 2}, "model.device_map", "leave it out"),
        ({"training.final_metrics": ["bleu"], "data.eval": None}, "training.final_metrics", "needs data.eval"),
        (
            {"training.final_metrics": ["bleu"], "data.completion_only": False},
            "training.final_metrics",
            "with data.completion_only: false no example has one: leave bleu out",
        ),
        (
            {"training.final_metrics": ["bleu"], "data.format": "text"},
            "training.final_metrics",
            "with data.format: text no example has one: leave bleu out",
        ),
        ({"training.targets": {"bleu": 18}}, "training.targets", "bleu is not measured"),
        ({"data.packing": True, "training.trainer": "transformers"}, "data.packing", "needs training.trainer: trl"),
        (
            {"training.lr_scheduler_type": "linear", "training.lr_scheduler_kwargs.num_cycles": 2},
            "training.lr_scheduler_kwargs",
            "num_cycles: not known to linear, which takes none",
        ),
        (
            {"training.early_stopping_threshold": 0.01, "training.eval_steps": 1},
            "training.early_stopping_threshold",
            "needs early_stopping_patience",
        ),
        ({"lora.init_lora_weights": "pissa"}, "lora.init_lora_weights", "gaussian"),
    ],
)
def test_what_cannot_be_together_is_refused_with_its_key(changes: dict[str, Any], path: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        build(changes)
    (problem,) = caught.value.problems
    assert problem.path == path
    assert words in problem.message


def test_einsum_names_become_those_of_transformers() -> None:
    jax = ".*q_einsum|.*kv_einsum|.*attn_vec_einsum|.*gate_proj|.*down_proj|.*up_proj"
    translated = translate_targets(jax)
    assert translated == ".*(q_proj)|.*(k_proj|v_proj)|.*(o_proj)|.*gate_proj|.*down_proj|.*up_proj"
    layers = [f"model.layers.3.self_attn.{name}_proj" for name in "qkvo"]
    assert all(re.fullmatch(translated, layer) for layer in layers)
    assert find_translations(jax) == {
        "q_einsum": ("q_proj",), "kv_einsum": ("k_proj", "v_proj"), "attn_vec_einsum": ("o_proj",),
    }  # fmt: skip


def test_einsum_names_in_a_list() -> None:
    assert translate_targets(("qkv_einsum", "q_proj", "gating_einsum")) == (
        "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj",
    )  # fmt: skip
    assert find_translations(("q_proj", "my_q_einsum")) == {}
    assert translate_targets("all-linear") == "all-linear"
