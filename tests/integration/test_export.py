"""Merging with the real PEFT: the merged model answers as base plus adapter does; and what a real attempt tells."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from tiny_runs import RankServer, create_tiny_run, read_logs

from lora_jobs.errors import RunError
from lora_jobs.runs import load_metrics
from lora_jobs.spec import load_spec
from lora_jobs.workflows.exporting import merge_run, pack_run

if TYPE_CHECKING:
    from pathlib import Path

    from lora_jobs.runs import Run

# PEFT warns of what is tested here, and calls what transformers has deprecated.
pytestmark = [
    pytest.mark.train,
    *(pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "FutureWarning", "DeprecationWarning")),
]


@pytest.fixture(scope="module")
def finished(ranks: RankServer, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("export")
    run = create_tiny_run(root, "tiny-1", tiny, training={"max_steps": 3, "learning_rate": 0.05})
    assert ranks.start(run, 1).wait() == [0], read_logs(run)
    return run


def find_answers(model: Any) -> Any:
    import torch

    torch.manual_seed(3)
    tokens = torch.randint(0, model.config.vocab_size, (2, 40))
    with torch.inference_mode():
        return model.eval()(input_ids=tokens).logits


def test_the_merged_model_and_the_packed_adapter_answer_as_the_adapter(finished: Run, tmp_path: Path) -> None:
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = merge_run(str(finished.directory), tmp_path / "merged")
    pack_run(str(finished.directory), tmp_path / "packed")
    base = AutoModelForCausalLM.from_pretrained(load_spec(finished.spec_path).model.name_or_path)
    adapted = AutoPeftModelForCausalLM.from_pretrained(str(finished.adapter))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    wanted = find_answers(adapted)
    torch.testing.assert_close(find_answers(merged), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(find_answers(base), wanted, atol=1e-3)  # the adapter does something
    packed = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "packed"))
    assert torch.equal(find_answers(packed), wanted)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(finished.adapter).chat_template
    assert (done.dtype, done.untied) == ("float32", False)
    assert done.difference is not None
    assert done.scale is not None
    assert done.difference < 1e-4 * done.scale
    assert "merged into its weights" in (tmp_path / "merged" / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_merge_that_fails_is_one_message_and_leaves_nothing(finished: Run, tiny: Path, tmp_path: Path) -> None:
    run = create_tiny_run(tmp_path, "tiny-2", tiny, model={"name_or_path": str(tmp_path / "gone"), "dtype": "float32"})
    finished.adapter.rename(run.adapter)
    try:
        with pytest.raises(RunError, match=r"merging failed: .*gone"):
            merge_run(str(run.directory), tmp_path / "merged")
    finally:
        run.adapter.rename(finished.adapter)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
    assert json.loads((finished.adapter / "adapter_config.json").read_text())["r"] == 4


def test_an_attempt_writes_where_it_ran_and_from_what(finished: Run) -> None:
    import peft

    told = json.loads((finished.directory / "attempt-1.environment.json").read_text())
    assert f"peft=={peft.__version__}" in told["packages"]
    assert told["packages"] == sorted(
        told["packages"], key=lambda line: line.partition("==")[0].partition(" ")[0].lower()
    )
    assert [rank["rank"] for rank in told["ranks"]] == [0]
    assert told["host"] == told["ranks"][0]["host"]
    started = next(row for row in load_metrics(finished) if row.get("event") == "started")
    assert told["inputs"]["data"]["examples"] == started["data"]["train"]["examples"]
    assert len(told["inputs"]["data"]["hash"]) == 32
    assert told["variables"].keys() <= {"CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "OMP_NUM_THREADS"}
    manifest = json.loads((finished.adapter / "MANIFEST.json").read_text())
    assert manifest["metadata"]["data"] == told["inputs"]["data"]
