"""The JSON Schema for editors: it takes what loads, and refuses what does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest

from lora_jobs.spec import build_schema, load_spec
from lora_jobs.spec.source import parse_source

ROOT = Path(__file__).resolve().parents[3]
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = build_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_every_shipped_job_is_valid(path: Path, validator: jsonschema.Draft202012Validator) -> None:
    validator.validate(parse_source(path.read_text(encoding="utf-8"), name=path.name).values)
    validator.validate(load_spec(path).to_values())


@pytest.mark.parametrize(
    "wrong",
    [
        {"lora": {"r": True}},
        {"lora": {"r": 0}},
        {"lora": {"r": "8"}},
        {"lora": {"r": 8, "alpha": 3}},
        {"lora": {"r": 8, "target_modules": []}},
        {"lora": {"r": 8, "target_modules": [3]}},
        {"name": "../x"},
        {"name": None},
        {"unknown": 1},
        {"training": {"max_steps": 5, "gradient_checkpointing": True, "activation_checkpointing": True}},
        {"training": {"max_steps": 5, "gradient_checkpointing": "no"}},
        {"deepspeed": {"zero_stage": 4}},
        {"resources": {"time": 60}},
        {"resources": {"partition": "a b"}},
    ],
)
def test_a_wrong_job_is_refused(wrong: dict[str, Any], validator: jsonschema.Draft202012Validator) -> None:
    good: dict[str, Any] = {
        "name": "a",
        "model": {"name_or_path": "b"},
        "lora": {"r": 8, "target_modules": "all-linear"},
        "data": {"train": "c"},
        "training": {"max_steps": 5, "gradient_checkpointing": True},
        "deepspeed": {"reduce_bucket_size": 5e8},
    }
    validator.validate(good)
    assert not validator.is_valid({**good, **wrong})


def test_the_schema_names_itself() -> None:
    schema = build_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["required"] == ["name", "model", "lora", "data", "training"]
    assert schema["additionalProperties"] is False
