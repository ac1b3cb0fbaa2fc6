"""Measured beside predicted, constants of earlier runs in the margins of a check, and the costs beside the memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lora_jobs.runs import Observation, append_metrics, create_run, record_constants
from lora_jobs.spec import load_spec, render_spec
from lora_jobs.units import GIB, MIB
from lora_jobs.workflows.checking import check_job
from lora_jobs.workflows.measuring import compare_memory

if TYPE_CHECKING:
    from lora_jobs.workflows.costing import Costs

ROOT = Path(__file__).resolve().parents[3]
SPEC = ROOT / "jobs/gemma2_9b_svg.yaml"
ESTIMATE = {
    "gpu": {"name": "A100-64"},
    "world_size": 2,
    "estimate": {"allocated_peak_bytes": 40 * GIB, "peak_bytes": 44 * GIB},
}


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "runs"
    root.mkdir()
    monkeypatch.setenv("LORA_JOBS_HOME", str(root))
    monkeypatch.chdir(tmp_path)
    return root


def make_run(runs: Path, *rows: dict[str, Any]) -> Any:
    files = {"spec.yaml": render_spec(load_spec(SPEC)), "estimate.json": json.dumps(ESTIMATE)}
    run = create_run(runs, "gemma2_9b_svg-1", files)
    for row in rows:
        append_metrics(run, row)
    return run


def test_the_highest_of_each_quantity_stands_beside_its_prediction(runs: Path) -> None:
    def row(allocated: int, reserved: int, used: int) -> dict[str, Any]:
        return {
            "kind": "train",
            "memory_allocated_bytes": allocated * GIB,
            "memory_reserved_bytes": reserved * GIB,
            "memory_device_used_bytes": used * GIB,
            "host_memory_bytes": GIB,
        }

    found = compare_memory(make_run(runs, row(38, 40, 43), row(39, 42, 42), {"kind": "note"}))
    assert [(one.name, one.bytes // GIB, one.predicted_bytes and one.predicted_bytes // GIB) for one in found] == [
        ("allocated", 39, 40),
        ("reserved", 42, None),
        ("device_used", 43, 44),
    ]
    assert found[0].to_json()["difference"] == -0.025


def test_on_a_cpu_the_process_stands_beside_what_must_fit(runs: Path) -> None:
    (found,) = compare_memory(make_run(runs, {"memory_allocated_bytes": 0, "host_memory_bytes": 33 * GIB}))
    assert (found.name, found.difference) == ("host", -0.25)


def test_nothing_measured_is_nothing_shown(runs: Path) -> None:
    assert compare_memory(make_run(runs)) == ()


def test_constants_of_earlier_runs_take_the_place_of_published_ones(runs: Path) -> None:
    before = check_job(SPEC).verdict.estimate
    record_constants(runs, "a-1", Observation("A100-64", 1, 700 * MIB, 1.02))
    record_constants(runs, "b-1", Observation("A100-64", 2, 1500 * MIB, 1.03))
    report = check_job(SPEC)
    after = report.verdict.estimate
    assert (after.components["cuda_context"], after.components["nccl_buffers"]) == (700 * MIB, 800 * MIB)
    assert after.allocated_peak_bytes == before.allocated_peak_bytes
    assert after.cautious_peak_bytes - after.peak_bytes == before.cautious_peak_bytes - before.peak_bytes
    assert "context measured in 2 of your runs" in report.gpu.source
    record_constants(runs, "c-1", Observation("A100-64", 1, 700 * MIB, 1.04))
    tight = check_job(SPEC).verdict.estimate
    assert tight.cautious_peak_bytes == tight.peak_bytes  # three runs: 4 % at most, less than the usual margin
    record_constants(runs, "d-1", Observation("A100-64", 1, 700 * MIB, 1.4))
    wide = check_job(SPEC).verdict.estimate
    assert wide.cautious_peak_bytes - wide.peak_bytes == pytest.approx(0.35 * wide.allocated_peak_bytes, abs=2)


def costs(*overrides: str) -> Costs:
    found = check_job(SPEC, overrides).costs
    assert found is not None
    return found


def test_host_memory_is_held_against_what_is_asked_for_or_a_node_has() -> None:
    asked, offloaded = costs(), costs("deepspeed.offload_optimizer=true", "resources.gpus_per_node=1")
    assert (asked.host.limit_of, asked.host.limit_bytes) == ("asked for", 240 * GIB)
    assert asked.host.parts["base_model_while_loading"] == 2 * 2 * 9_241_705_984
    assert offloaded.host.parts["offloaded_optimizer_pinned"] > 2 * 9_241_705_984
    free = costs("resources.mem=null", "resources.gpus_per_node=4")
    assert (free.host.limit_of, free.host.limit_bytes) == ("in a node", 494000 * MIB)


def test_disk_holds_the_kept_checkpoints_the_best_and_the_next() -> None:
    plain = costs("training.load_best_model_at_end=false")
    assert (costs().disk.kept, plain.disk.kept) == (4, 3)
    assert plain.disk.total == 3 * plain.disk.checkpoint_bytes + plain.disk.adapter_bytes


def test_time_without_data_is_for_some_rows_and_with_it_counts_the_requeues(tmp_path: Path) -> None:
    sample = costs().time
    assert sample is not None
    assert (sample.rows, sample.requeues) == (992, None)
    rows = "".join(json.dumps({"svg": "<svg/>" * 300, "caption": "a shape"}) + "\n" for _ in range(4000))
    (tmp_path / "train.jsonl").write_text(rows)
    settings = [f"data.train={tmp_path / 'train.jsonl'}", "data.eval=null", "training.eval_steps=null"]
    settings += ["training.load_best_model_at_end=false", "training.early_stopping_patience=null"]
    settings += ["training.early_stopping_threshold=0"]
    whole = costs(*settings).time
    short = costs(*settings, "resources.time=00:20:00").time
    assert whole is not None
    assert short is not None
    assert (whole.rows, whole.duration.steps, whole.requeues) == (None, 250, 0)
    assert short.requeues is not None
    assert short.requeues >= whole.duration.components["training"] // 1200
    few = costs(*settings, "resources.time=00:20:00", "resume.max_attempts=2")
    assert any("resume allows 2" in note for note in few.notes)
