"""The rows of a priority: each part that counts, its weight, and that they sum to the whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_jobs.cluster.parsers import Factors, parse_config
from lora_jobs.workflows.priorities import find_weight, list_factors

RECORDED = Path(__file__).parents[2] / "slurm_output" / "22.05"


def test_the_rows_sum_to_the_priority_and_every_weight_is_shown():
    config = parse_config((RECORDED / "scontrol_config.txt").read_text())
    config |= {"PriorityWeightAssoc": "300", "PriorityWeightTRES": "cpu=1000,gres/gpu=2000"}
    factors = Factors(9407, 5, 5000, 172, 200, 4000, 43, 7, 100, 80)
    rows = list_factors(factors, config)
    assert sum(row.points for row in rows) == factors.priority
    assert {row.name: (row.points, row.weight) for row in rows} == {
        "age": (5, 1000), "fair-share": (5000, 10000), "association": (80, 300), "size": (172, 1000),
        "partition": (200, 2000), "QOS": (4000, 4000), "TRES": (43, 3000), "site": (7, None), "nice": (-100, None),
    }  # fmt: skip
    assert next(row.changes for row in rows if row.name == "TRES") == ("what the job asks for: cpu=1000, gres/gpu=2000")


def test_what_has_no_weight_and_gives_nothing_is_no_row():
    config = parse_config((RECORDED / "scontrol_config.txt").read_text())
    rows = list_factors(Factors(5372, 0, 5000, 172, 200, 0, 0, 0, 0, 0), config)
    assert [row.name for row in rows] == ["age", "fair-share", "size", "partition", "QOS"]


@pytest.mark.parametrize(
    ("text", "weight"),
    [
        ("1000", 1000), ("0", 0), ("", None), ("(null)", None), ("cpu=1000,gres/gpu=2000", 3000),
        ("CPU=0.5,Mem=2.75", 3), ("cpu=10,mem=-5", 10), ("Mem=2000G", None),
    ],
)  # fmt: skip
def test_weights(text: str, weight: int | None):
    """Numbers, and lists as slurm.conf(5) has them for PriorityWeightTRES; a negative one takes points away."""
    assert find_weight(text) == weight
