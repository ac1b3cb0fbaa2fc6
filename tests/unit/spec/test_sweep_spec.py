"""A sweep stands for every combination of its values, in their order; what it can't vary is refused by its line."""

from __future__ import annotations

import pytest

from lora_jobs.errors import SpecError
from lora_jobs.spec import count_variants, expand_sweep, parse_spec, parse_sweep_option, show_variant

SPEC = """
name: t
model: {name_or_path: m}
lora: {r: 4}
data: {train: t.jsonl}
training: {max_steps: 1}
"""


def parse(*options: str):
    return parse_spec(SPEC, source="t.yaml", overrides=[parse_sweep_option(option) for option in options])


def find_messages(*options: str) -> list[tuple[str, str]]:
    with pytest.raises(SpecError) as caught:
        expand_sweep(parse(*options))
    return [(problem.path, problem.message) for problem in caught.value.problems]


def test_every_combination_the_last_key_fastest():
    spec = parse("lora.r=8,16", "training.learning_rate=[1e-4, 2e-4]", "training.optim=adamw_torch")
    variants = expand_sweep(spec)
    assert count_variants(spec) == len(variants) == 4
    assert [show_variant(variant.values) for variant in variants] == [
        "lora.r=8 training.learning_rate=0.0001 training.optim=adamw_torch",
        "lora.r=8 training.learning_rate=0.0002 training.optim=adamw_torch",
        "lora.r=16 training.learning_rate=0.0001 training.optim=adamw_torch",
        "lora.r=16 training.learning_rate=0.0002 training.optim=adamw_torch",
    ]
    assert [(each.spec.lora.r, each.spec.training.learning_rate, each.spec.sweep) for each in variants] == [
        (8, 1e-4, {}), (8, 2e-4, {}), (16, 1e-4, {}), (16, 2e-4, {}),
    ]  # fmt: skip
    assert show_variant(variants[0].values, short=True) == "r=8 learning_rate=0.0001 optim=adamw_torch"


def test_an_option_replaces_the_files_values_of_its_key():
    text = SPEC + "sweep: {lora.r: [1, 2], training.seed: [3]}\n"
    spec = parse_spec(text, source="t.yaml", overrides=[parse_sweep_option("lora.r=8")])
    assert spec.sweep == {"lora.r": (8,), "training.seed": (3,)}


def test_a_key_of_a_section_within_a_section():
    spec = parse("model.quantization.load_in_4bit=true", "model.quantization.bnb_4bit_quant_type=nf4,fp4")
    quantizations = [variant.spec.model.quantization for variant in expand_sweep(spec)]
    assert [each and (each.load_in_4bit, each.bnb_4bit_quant_type) for each in quantizations] == [
        (True, "nf4"), (True, "fp4"),
    ]  # fmt: skip


def test_a_spec_without_a_sweep_stands_for_itself():
    spec = parse()
    (variant,) = expand_sweep(spec)
    assert (variant.spec, dict(variant.values), count_variants(spec)) == (spec, {}, 1)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("resources.time=1,2", "all tasks of a Slurm array ask for the same"),
        ("resources.gpus_per_node=1,2", "submit once a value with --set"),
        ("lora.rank=1", "is no key that can be swept"),
        ("model.quantization.bits=4,8", "is no key that can be swept"),
        ("lora.r.x=4,8", "is no key that can be swept"),
        ("lora.=4,8", "is no key that can be swept"),
        ("name=a,b", "is no key that can be swept"),
        ("lora.r=8,16,8", "holds 8 twice"),
    ],
)
def test_what_can_not_be_swept(option: str, words: str):
    with pytest.raises(SpecError) as caught:
        parse(option)
    (problem,) = caught.value.problems
    assert problem.path == f"sweep.{option.partition('=')[0]}"
    assert words in problem.message


@pytest.mark.parametrize("text", ["lora.r", "lora.r=", "=8", " = "])
def test_what_is_no_sweep_option(text: str):
    with pytest.raises(SpecError, match=r"is no sweep: wanted section\.key=value,value"):
        parse_sweep_option(text)


def test_every_wrong_combination_is_named():
    assert find_messages("lora.r=0,8,-1") == [
        ("lora.r", "wanted at least 1, got 0 (lora.r=0)"),
        ("lora.r", "wanted at least 1, got -1 (lora.r=-1)"),
    ]
    assert find_messages("training.bf16=true", "training.fp16=false,true") == [
        ("training.bf16", "bf16 and fp16 exclude each other (training.bf16=true training.fp16=true)")
    ]
