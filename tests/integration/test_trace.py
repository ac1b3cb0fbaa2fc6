"""The closed form against the real code on fake tensors: every row of the model table by the main knobs.

A new version of a library that allocates otherwise fails here, before an estimate is silently wrong.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lora_jobs.sizing import find_shape
from lora_jobs.training.trace.shim import NAME, library_path

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
ROWS = memory.list_tested_rows()


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty cache folder for these tests: no earlier trace is read back. Only the built library is taken along."""
    root = tmp_path_factory.mktemp("cache")
    built = library_path().parent
    (root / "lora-jobs").mkdir()
    if (built / f"{NAME}.so").is_file():
        (root / "lora-jobs" / built.name).symlink_to(built)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root))
        yield root / "lora-jobs"


@pytest.fixture(scope="module")
def traces(request: pytest.FixtureRequest, cache: Path) -> Iterator[dict[str, Future[Any]]]:
    """The traces of the rows that are asked for, under way in a few processes from the start."""
    chosen = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    rows = {name: spec for name, spec in ROWS.items() if name in chosen}
    with ThreadPoolExecutor(1) as pool:
        futures: dict[str, Future[Any]] = {name: Future() for name in rows}

        def collect() -> None:
            try:
                for name, traced in memory.trace_all(rows):
                    futures[name].set_result(traced)
            except BaseException as error:
                for future in futures.values():
                    if not future.done():
                        future.set_exception(error)
                raise

        pool.submit(collect)
        yield futures


@pytest.fixture(scope="module")
def tracer(cache: Path) -> Iterator[Any]:
    server = memory.Tracer()
    yield server
    server.close()


@pytest.mark.parametrize("name", ROWS)
def test_the_estimate_is_that_of_the_real_code(traces: dict[str, Future[Any]], name: str) -> None:
    traced = traces[name].result()
    assert "error" not in traced, traced
    row = memory.compare(ROWS[name], traced)
    assert abs(row["error_percent"]) <= LIMIT_PERCENT, row
    off = {part: percent for part, percent in row["components_percent"].items() if abs(percent) > LIMIT_PERCENT}
    if find_shape(ROWS[name].model.name_or_path).vision is not None and off.get("gradients", 0) > 0:
        del off["gradients"]  # text gives the adapters on an idle vision tower none; counted, on the safe side
    assert off == {}, row


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


def test_a_window_in_the_later_layers_only(tracer: Any, tmp_path: Path) -> None:
    """Qwen's max_window_layers: each kind of layer has a mask of its own."""
    config = {
        "model_type": "qwen2", "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816,
        "num_hidden_layers": 10, "num_attention_heads": 16, "num_key_value_heads": 4,
        "use_sliding_window": True, "max_window_layers": 6, "sliding_window": 512,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    spec = memory.build_spec(
        str(tmp_path), training__per_device_train_batch_size=4, training__activation_checkpointing=False
    )
    row = memory.compare(spec, tracer.trace(spec))
    assert abs(row["error_percent"]) <= LIMIT_PERCENT, row


def test_evaluations_are_traced_wherever_there_are_held_out_examples(tracer: Any) -> None:
    """Training evaluates them before its first step and after its last, also without training.eval_steps."""
    held_out = memory.build_spec("smollm2-135m", data__eval="eval.jsonl", training__per_device_eval_batch_size=64)
    assert held_out.training.eval_steps is None
    traced = tracer.trace(held_out)
    assert traced["peak_bytes"] == max(traced["instants"][name] for name in ("evaluation_layer", "evaluation_loss"))
    assert abs(memory.compare(held_out, traced)["error_percent"]) <= LIMIT_PERCENT
    without = tracer.trace(memory.build_spec("smollm2-135m", training__per_device_eval_batch_size=64))
    assert traced["instants"].items() > without["instants"].items()


def test_a_trace_read_back_is_the_one_that_was_made(tracer: Any, cache: Path) -> None:
    """What is stored holds nothing of the closed form's: DeepSpeed's state is added to it at every reading."""
    sharded = memory.build_spec("smollm2-135m", deepspeed__zero_stage=2, resources__gpus_per_node=2)
    before = set((cache / "traces").glob("*.json"))
    first, again = tracer.trace(sharded), tracer.trace(sharded)
    (stored,) = set((cache / "traces").glob("*.json")) - before
    assert first == again
    assert json.loads(stored.read_text())["instants"]["loss_backward"] < first["instants"]["loss_backward"]


def test_what_cannot_be_traced_is_said(tracer: Any) -> None:
    sharded = memory.build_spec("smollm2-135m", deepspeed__zero_stage=3)
    assert "zero_stage: 3 cannot be traced" in tracer.trace(sharded)["error"]


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


NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": 50432,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
}


def check_exact(directory: Path, config: dict[str, Any], **lora: Any) -> subprocess.CompletedProcess[str]:
    (directory / "model").mkdir()
    (directory / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    changes = {f"lora__{key}": value for key, value in lora.items()}
    spec = memory.build_spec(str(directory / "model"), resources__gpu="A100-64", **changes)
    (directory / "job.yaml").write_text(json.dumps(spec.to_values()), encoding="utf-8")
    command = [sys.executable, "-m", "lora_jobs", "check", str(directory / "job.yaml"), "--exact", "--json"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_model_that_the_closed_form_does_not_know_is_sized_by_its_trace(tmp_path: Path) -> None:
    done = check_exact(tmp_path, NEOX, target_modules=["query_key_value"])
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["source"] == "trace"
    # Each layer: 4 h^2 + 2 h i weights, h + 3h + h + i + h biases, two norms of 2 h; two embeddings; the last norm.
    h, i = 512, 2048
    assert report["parameters"]["base"] == 2 * 50432 * h + 6 * (4 * h * h + 2 * h * i + 5 * h + i + 4 * h) + 2 * h
    assert report["parameters"]["trainable"] == 6 * 16 * (h + 3 * h)
    assert report["estimate"]["allocated_peak_bytes"] == max(report["exact"]["instants"].values())


def test_a_config_that_transformers_refuses_is_one_message(tmp_path: Path) -> None:
    done = check_exact(tmp_path, {**NEOX, "hidden_size": "512"}, target_modules=["query_key_value"])
    assert done.returncode == 2
    assert "config.json: " in done.stderr
    assert "hidden_size" in done.stderr
