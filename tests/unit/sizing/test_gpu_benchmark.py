"""`make bench-gpu` without a GPU: its list of rows, what it skips, and its judgement, on rows made up by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from gpu_judgement import find_reason_to_skip, judge  # noqa: E402
from memory import FLASH, NF4, build_spec  # noqa: E402

GIB = 2**30
MADE_UP: dict[str, dict[str, Any]] = json.loads("""{
 "made up by hand, no GPU measured this: one": {
  "train_allocated_bytes": 10000000000, "train_reserved_bytes": 10500000000, "train_device_used_bytes": 11000000000,
  "evaluation_allocated_bytes": 8000000000, "evaluation_reserved_bytes": 10500000000,
  "evaluation_device_used_bytes": 11000000000, "gpu": "NVIDIA A100-SXM4-80GB", "gpu_bytes": 85094236160,
  "predicted_train_bytes": 10100000000, "predicted_evaluation_bytes": 8080000000, "predicted_fits_bytes": 12500000000
 },
 "made up by hand: two": {
  "train_allocated_bytes": 20000000000, "train_reserved_bytes": 21000000000, "train_device_used_bytes": 21600000000,
  "evaluation_allocated_bytes": 30000000000, "evaluation_reserved_bytes": 31000000000,
  "evaluation_device_used_bytes": 31600000000, "gpu": "NVIDIA A100-SXM4-80GB", "gpu_bytes": 85094236160,
  "predicted_train_bytes": 19200000000, "predicted_evaluation_bytes": 30000000000, "predicted_fits_bytes": 35700000000
 },
 "made up by hand: three": {"error": "torch.OutOfMemoryError: CUDA out of memory."},
 "made up by hand: four": {"skipped": "bitsandbytes not installed"}
}""")
ONE, TWO, THREE, FOUR = MADE_UP


def change(name: str, **values: int) -> dict[str, dict[str, Any]]:
    return {**MADE_UP, name: {**MADE_UP[name], **values}}


def test_rows_within_the_limits_are_good() -> None:
    # +1 %, +1 %, -4 % and 0 %: the median is 1, the worst 4.
    assert judge(MADE_UP) == {
        "measured": 2,
        "skipped": 1,
        "failed": 1,
        "median_percent": 1.0,
        "worst_percent": 4.0,
        "worst_row": f"{TWO}, train",
        "false_fits": [],
        "good": True,
    }


@pytest.mark.parametrize(
    ("rows", "field", "value"),
    [
        (change(TWO, predicted_train_bytes=18_800_000_000), "worst_percent", 6.0),
        (change(ONE, predicted_train_bytes=10_300_000_000, predicted_evaluation_bytes=8_240_000_000),
         "median_percent", 3.0),
        (change(TWO, evaluation_device_used_bytes=35_700_000_001), "false_fits", [TWO]),
    ],
    ids=["worst", "median", "false fits"],
)  # fmt: skip
def test_beyond_a_limit_is_not_good(rows: dict[str, dict[str, Any]], field: str, value: Any) -> None:
    found = judge(rows)
    assert found[field] == value
    assert found["good"] is False


def test_nothing_measured_is_not_good() -> None:
    assert judge({name: MADE_UP[name] for name in (THREE, FOUR)}) == {
        "measured": 0,
        "skipped": 1,
        "failed": 1,
        "good": False,
    }


def test_rows_whose_packages_are_missing_are_skipped_with_the_reason() -> None:
    everything = ("bitsandbytes", "flash_attn", "deepspeed")
    for changes, package in ((NF4, "bitsandbytes"), (FLASH, "flash_attn"), ({"deepspeed__zero_stage": 2}, "deepspeed")):
        spec = build_spec("llama-3.2-1b", **changes)
        assert find_reason_to_skip(spec, [name for name in everything if name != package]) == f"{package} not installed"
        assert find_reason_to_skip(spec, everything) is None


def test_a_dry_run_lists_every_row_with_its_prediction() -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu_memory.py"), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *lines, count = done.stdout.splitlines()
    assert count == f"{len(lines)} rows"
    assert len(lines) >= 40
    for model in ("gemma-2-9b", "gemma-3-1b", "gemma-3-4b", "llama-3.2-3b", "llama-3.1-8b", "qwen2.5-7b"):
        assert any(line.startswith(f"{model} ") for line in lines)
    for knob in ("flash_attention_2", "modules_to_save", "NF4", "ZeRO-2", "8192", "half adapters"):
        assert any(knob in line for line in lines)
    assert all(" GiB training " in line and line.endswith(" GiB evaluation") for line in lines)
