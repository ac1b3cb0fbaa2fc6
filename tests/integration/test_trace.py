"""The closed form against the real code on fake tensors: every row of the model table by the main knobs.

A new version of a library that allocates otherwise fails here, before an estimate is silently wrong.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "memory.py"
LIMIT_PERCENT = 0.5

pytestmark = pytest.mark.train


def load_program() -> Any:
    found = importlib.util.spec_from_file_location("memory_benchmark", PROGRAM)
    assert found is not None
    assert found.loader is not None
    program = importlib.util.module_from_spec(found)
    found.loader.exec_module(program)
    return program


memory = load_program()
# Every model by the main knobs; the rarer knobs on two models here, on all five families in `make bench-memory`.
ROWS = {
    name: spec
    for name, spec in memory.list_rows().items()
    if not name.endswith(tuple(f" {variant}" for variant in memory.VARIANTS))
    or name.startswith(("gemma-3-1b ", "llama-3.2-1b "))
}


@pytest.fixture(scope="module")
def tracer() -> Iterator[Any]:
    server = memory.Tracer()
    yield server
    server.close()


@pytest.mark.parametrize("name", ROWS)
def test_the_estimate_is_that_of_the_real_code(tracer: Any, name: str) -> None:
    traced = tracer.trace(ROWS[name])
    assert "error" not in traced, traced
    row = memory.compare(ROWS[name], traced)
    assert abs(row["error_percent"]) <= LIMIT_PERCENT, row


def test_few_layers_stand_for_all_of_them(tracer: Any) -> None:
    """Extrapolated and traced whole, layer by layer: a regular expression with a number in it asks for all layers."""
    few = memory.build_spec("smollm2-135m", training__activation_checkpointing=False)
    names = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    whole = memory.build_spec(
        "smollm2-135m",
        training__activation_checkpointing=False,
        lora__target_modules=rf".*layers\.[0-9]+\..*({names})",
    )
    traced, full = tracer.trace(few), tracer.trace(whole)
    assert full["layers_traced"] == [30]
    # The norms of all gradients are stacked into one block, which is rounded up once, not once a layer.
    for name, peak in full["instants"].items():
        assert abs(traced["instants"][name] - peak) <= 2048, name


def test_what_cannot_be_traced_is_said(tracer: Any) -> None:
    quantized = memory.build_spec("llama-3.2-1b", model__quantization={"load_in_4bit": True})
    assert "bitsandbytes" in tracer.trace(quantized)["error"]


def test_check_exact_tells_the_traced_peak(tmp_path: Path) -> None:
    values = memory.build_spec("smollm2-135m", resources__gpu="A100-64").to_values()
    (tmp_path / "job.yaml").write_text(json.dumps(values), encoding="utf-8")
    command = [sys.executable, "-m", "lora_jobs", "check", str(tmp_path / "job.yaml"), "--exact", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["fits"] is True
    assert report["exact"]["allocated_peak_bytes"] == max(report["exact"]["instants"].values())
    estimated = report["estimate"]["peak_bytes"]
    assert 0 < report["exact"]["allocated_peak_bytes"] < estimated
