"""The tables that a user may look things up in."""

from __future__ import annotations

from lora_jobs.workflows.listing import list_models


def test_a_models_source_names_every_hub_id_that_it_stands_for() -> None:
    rows = {row["name"]: row for row in list_models()}
    assert rows["gemma-3-4b"] == {
        "name": "gemma-3-4b",
        "family": "gemma3_text",
        "parameters": 4_300_079_472,
        "source": "config.json of google/gemma-3-4b-pt, google/gemma-3-4b-it",
    }
    assert rows["qwen3-32b"]["source"] == "config.json of Qwen/Qwen3-32B"
