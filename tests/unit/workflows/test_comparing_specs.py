"""Another number of GPUs with the same global batch."""

from __future__ import annotations

import pytest

from lora_jobs.errors import SpecError
from lora_jobs.spec import JobSpec, parse_spec
from lora_jobs.workflows.comparing_specs import arrange_gpus, list_inexact


def build(nodes: int, gpus: int, accumulation: int, dropout: float = 0.0) -> JobSpec:
    return parse_spec(
        "name: tiny\nmodel: {name_or_path: org/m}\ndata: {train: t.jsonl}\n"
        f"lora: {{r: 8, lora_dropout: {dropout}}}\n"
        f"training: {{max_steps: 30, gradient_accumulation_steps: {accumulation}}}\n"
        f"resources: {{nodes: {nodes}, gpus_per_node: {gpus}}}\n",
        source="tiny.yaml",
    )


@pytest.mark.parametrize(
    ("stored", "gpus", "nodes", "per_node", "accumulation"),
    [
        ((1, 2, 1), 1, 1, 1, 2),
        ((2, 4, 2), 4, 2, 2, 4),
        ((2, 4, 2), 16, 2, 8, 1),
        ((2, 4, 3), 1, 1, 1, 24),
        ((1, 1, 8), 2, 1, 2, 4),
    ],
)
def test_accumulation_makes_up_for_the_processes(
    stored: tuple[int, int, int], gpus: int, nodes: int, per_node: int, accumulation: int
) -> None:
    assert arrange_gpus(build(*stored), gpus) == [
        f"resources.nodes={nodes}",
        f"resources.gpus_per_node={per_node}",
        f"training.gradient_accumulation_steps={accumulation}",
    ]


def test_the_same_number_changes_nothing() -> None:
    assert arrange_gpus(build(2, 1, 1), 2) == arrange_gpus(build(2, 1, 1), None) == []


def test_a_global_batch_that_does_not_divide_is_refused_with_the_choices() -> None:
    with pytest.raises(SpecError, match="--gpus 3 can't keep the global batch: 2 processes x 2") as raised:
        arrange_gpus(build(1, 2, 2), 3)
    assert raised.value.hint == "--gpus 1, 2, 4 divide it"


def test_what_is_not_bit_exact_is_said() -> None:
    assert list_inexact(build(1, 2, 1), build(1, 2, 1)) == ()
    plain, dropping = (list_inexact(build(1, 2, 1, d), build(1, 1, 2, d)) for d in (0.0, 0.1))
    assert [line.partition(":")[0] for line in plain] == ["sums over micro-batches are taken in another order"]
    assert "lora.lora_dropout: other processes draw other random numbers" in dropping
