"""The JSON Schema of a job spec, for editors that complete and check YAML as it is typed."""

from __future__ import annotations

from typing import Any

from lora_jobs.spec.job import JobSpec
from lora_jobs.spec.section import Section


def build_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a job spec file."""
    schema = JobSpec.model_json_schema(mode="validation")
    for section in Section.__subclasses__():
        definition = schema["$defs"].get(section.__name__)
        if definition is not None:
            _add_older_words(definition, section)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "lora-jobs job spec",
    }


def _add_older_words(definition: dict[str, Any], section: type[Section]) -> None:
    for old, new in section.older_words.items():
        definition["properties"][old] = {
            **definition["properties"][new],
            "title": old,
            "description": f"older word for {new}",
            "deprecated": True,
        }
        definition.setdefault("allOf", []).append({"not": {"required": [old, new]}})
