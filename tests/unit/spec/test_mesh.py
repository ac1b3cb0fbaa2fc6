"""JAX's mesh notation: what it stands for, and where it contradicts the rest."""

from __future__ import annotations

import pytest

from lora_jobs.errors import SpecError
from lora_jobs.spec import JobSpec, parse_spec, render_spec

TEXT = """
name: mesh
model: {name_or_path: org/model}
lora: {r: 8}
data: {train: train.jsonl}
training: {max_steps: 3}
resources: {%s}
"""


def build(resources: str, more: str = "") -> JobSpec:
    return parse_spec(TEXT % resources + more, source="f")


@pytest.mark.parametrize(
    ("resources", "nodes", "gpus", "stage"),
    [
        ("mesh_shape: [[1, 1], [fsdp, tp]]", 1, 1, None),
        ("mesh_shape: [[4, 1], [fsdp, tp]]", 1, 4, 3),
        ("mesh_shape: [[8], [fsdp]], nodes: 2", 2, 4, 3),
        ("mesh_shape: [[4, 1], [dp, tp]], gpus_per_node: 4", 1, 4, None),
        ("mesh_shape: [[2, 2], [data, fsdp]]", 1, 4, 3),
    ],
)
def test_a_mesh_stands_for_gpus_and_a_zero_stage(resources: str, nodes: int, gpus: int, stage: int | None) -> None:
    spec = build(resources)
    assert (spec.resources.nodes, spec.resources.gpus_per_node) == (nodes, gpus)
    assert (spec.deepspeed.zero_stage if spec.deepspeed else None) == stage
    assert parse_spec(render_spec(spec), source="stored") == spec


@pytest.mark.parametrize(
    ("resources", "more", "path", "words"),
    [
        ("mesh_shape: [[2, 2], [fsdp, tp]]", "", "resources.mesh_shape", "PEFT's adapters fail in those"),
        (
            "mesh_shape: [[4, 1], [fsdp, tp]], gpus_per_node: 2", "", "resources.mesh_shape",
            "is 4 x 1 = 4 devices, but nodes x gpus_per_node is 1 x 2 = 2",
        ),
        ("mesh_shape: [[3], [dp]], nodes: 2", "", "resources.mesh_shape", "is 3 = 3 devices"),
        ("mesh_shape: [[4], [fsdp, tp]]", "", "resources.mesh_shape", "1 sizes and 2 axes"),
        ("mesh_shape: [[2, 2], [dp, dp]]", "", "resources.mesh_shape", "names an axis twice"),
        ("mesh_shape: [[4, 1], [fsdp, pp]]", "", "resources.mesh_shape.1.1", "wanted one of fsdp, dp, data, tp"),
        ("mesh_shape: 4", "", "resources.mesh_shape", "wanted a list"),
        (
            "mesh_shape: [[4], [fsdp]]", "deepspeed: {zero_stage: 2}", "resources.mesh_shape",
            "which is deepspeed.zero_stage: 3 (it is 2)",
        ),
    ],
)  # fmt: skip
def test_a_mesh_that_cannot_be_is_one_clear_error(resources: str, more: str, path: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        build(resources, more)
    (problem,) = caught.value.problems
    assert (problem.path, problem.line) == (path, 7)
    assert words in problem.message
