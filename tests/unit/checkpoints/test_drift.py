"""What changed since the checkpoint, and what that means."""

from __future__ import annotations

import pytest

from lora_jobs.checkpoints import Drift, find_drift
from lora_jobs.checkpoints.drift import _RULES, find_rule
from lora_jobs.spec import JobSpec, parse_spec

SPEC = """
name: tiny
model: {name_or_path: org/tiny-model, quantization: {load_in_4bit: true}}
lora: {r: 8, lora_alpha: 16}
data: {train: train.jsonl}
training: {max_steps: 30}
deepspeed: {zero_stage: 2}
resources: {nodes: 2, gpus_per_node: 1}
"""


def _spec(*overrides: str) -> JobSpec:
    return parse_spec(SPEC, source="tiny.yaml", overrides=overrides)


def _found(*overrides: str) -> list[tuple[str, object, object, str]]:
    return [(drift.key, drift.stored, drift.present, drift.kind) for drift in find_drift(_spec(), _spec(*overrides))]


def test_the_same_spec_has_no_drift() -> None:
    assert find_drift(_spec(), _spec()) == []


@pytest.mark.parametrize(
    ("override", "stored", "present", "kind"),
    [
        ("model.name_or_path=org/other", "org/tiny-model", "org/other", "forbidden"),
        ("model.revision=main", None, "main", "forbidden"),
        ("model.quantization.load_in_4bit=true", None, None, None),
        ("model.quantization.bnb_4bit_quant_type=fp4", "nf4", "fp4", "forbidden"),
        ("model.attn_implementation=eager", None, "eager", "allowed_with_flag"),
        ("lora.r=16", 8, 16, "forbidden"),
        ("lora.lora_alpha=32", 16.0, 32.0, "forbidden"),
        ("lora.lora_dropout=0.1", 0.0, 0.1, "allowed_with_flag"),
        ("lora.modules_to_save=[lm_head]", [], ["lm_head"], "forbidden"),
        ("data.train=other.jsonl", "train.jsonl", "other.jsonl", "allowed_with_flag"),
        ("data.eval=held_out.jsonl", None, "held_out.jsonl", "free"),
        ("training.max_steps=60", 30, 60, "allowed_with_flag"),
        ("training.learning_rate=1e-3", 2e-4, 1e-3, "forbidden"),
        ("training.gradient_accumulation_steps=4", 1, 4, "allowed_with_flag"),
        ("training.optim=adamw_torch", "adamw_torch_fused", "adamw_torch", "forbidden"),
        ("training.bf16=true", False, True, "forbidden"),
        ("training.save_steps=5", 100, 5, "free"),
        ("deepspeed.zero_stage=1", 2, 1, "forbidden"),
        ("deepspeed.reduce_bucket_size=1000", "auto", 1000, "free"),
        ("resources.time=24:00:00", "01:00:00", "24:00:00", "free"),
        ("resources.nodes=4", 2, 4, "forbidden"),
        ("resume.max_attempts=3", 20, 3, "free"),
        ("name=other", "tiny", "other", "free"),
    ],
)
def test_one_change(override: str, stored: object, present: object, kind: str | None) -> None:
    key = override.partition("=")[0]
    assert _found(override) == ([] if kind is None else [(key, stored, present, kind)])


def test_a_section_that_one_side_leaves_out_is_one_drift() -> None:
    stored, present = _spec(), _spec("deepspeed=null")
    assert [(drift.key, drift.present, drift.kind) for drift in find_drift(stored, present)] == [
        ("deepspeed", None, "forbidden")
    ]
    assert [(drift.key, drift.stored, drift.kind) for drift in find_drift(present, stored)] == [
        ("deepspeed", None, "forbidden")
    ]


def test_the_same_number_of_processes_may_be_arranged_anew() -> None:
    assert _found("resources.nodes=1", "resources.gpus_per_node=2") == [
        ("resources.nodes", 2, 1, "free"),
        ("resources.gpus_per_node", 1, 2, "free"),
    ]


def test_without_deepspeed_another_number_of_processes_needs_the_users_word() -> None:
    stored, present = _spec("deepspeed=null"), _spec("deepspeed=null", "resources.nodes=1")
    assert [drift.kind for drift in find_drift(stored, present)] == ["allowed_with_flag"]


def test_alpha_left_out_is_alpha_equal_to_r() -> None:
    assert find_drift(_spec("lora.lora_alpha=8"), _spec("lora.lora_alpha=null")) == []


def test_a_drift_says_why_and_goes_into_json() -> None:
    (drift,) = find_drift(_spec(), _spec("lora.r=16"))
    why = "the checkpoint's weights belong to the stored value"
    assert drift == Drift("lora.r", 8, 16, "forbidden", why)
    assert drift.to_json() == {"key": "lora.r", "stored": 8, "present": 16, "kind": "forbidden", "why": why}


def _keys(values: dict, prefix: str = "") -> set[str]:
    found = set()
    for name, value in values.items():
        found.add(prefix + name)
        if isinstance(value, dict):
            found |= _keys(value, f"{prefix}{name}.")
    return found


def test_every_key_of_a_spec_has_a_row_and_every_row_a_key() -> None:
    known = _keys(_spec().to_values())
    assert set(_RULES) - known == set()
    assert {key for key in known if key.partition(".")[0] not in _RULES} == set()


def test_a_key_that_no_row_knows_needs_the_users_word() -> None:
    assert find_rule("future.key")[0] == "allowed_with_flag"
