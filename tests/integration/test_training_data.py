"""Rows to tokens: what the loss counts, what is left out, and what the finished adapter is worth elsewhere."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from lora_jobs.errors import SpecError
from lora_jobs.spec import DataSpec

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tiny_runs import RankServer

    from lora_jobs.runs import Run

# The libraries warn about themselves while they are imported.
pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]

SVG = '<svg viewBox="0 0 50 50"><circle r="2" fill="red"/></svg>'


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny / "models" / "tiny_gemma2")


def split_loss(row: dict[str, Any], tokenizer: Any, **data: Any) -> tuple[str, list[str]]:
    """The whole example as text, and the pieces of it that the loss counts."""
    from lora_jobs.training.data import IGNORED, render_row, tokenize

    spec = DataSpec(train="unused.jsonl", **data)
    ids, labels = tokenize(render_row(row, spec, tokenizer), spec, tokenizer)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    pieces: list[list[int]] = []
    for before, label in zip([IGNORED, *labels], labels, strict=False):
        if label != IGNORED:
            if before == IGNORED:
                pieces.append([])
            pieces[-1].append(label)
    return tokenizer.decode(ids), [tokenizer.decode(piece) for piece in pieces]


def test_prompt_and_completion_stand_side_by_side_and_the_completion_counts(tokenizer: Any) -> None:
    row = {"prompt": SVG, "completion": " A small red circle."}
    text, counted = split_loss(row, tokenizer, format="prompt_completion")
    assert text == f"{SVG} A small red circle.<eos>"
    assert counted == [" A small red circle.<eos>"]


def test_without_completion_only_everything_counts(tokenizer: Any) -> None:
    row = {"prompt": "a ", "completion": "b"}
    assert split_loss(row, tokenizer, format="prompt_completion", completion_only=False)[1] == ["a b<eos>"]


def test_a_text_counts_as_a_whole(tokenizer: Any) -> None:
    assert split_loss({"text": "A red line."}, tokenizer, format="text") == ("A red line.<eos>", ["A red line.<eos>"])


def test_every_turn_of_the_assistant_counts_with_its_end_mark(tokenizer: Any) -> None:
    turns = [("user", "What?"), ("assistant", "A line."), ("user", "Colour?"), ("assistant", "red")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    text, counted = split_loss(row, tokenizer, format="chat")
    assert text == (
        "<bos><start_of_turn>user\nWhat?<end_of_turn>\n<start_of_turn>model\nA line.<end_of_turn>\n"
        "<start_of_turn>user\nColour?<end_of_turn>\n<start_of_turn>model\nred<end_of_turn>\n"
    )
    assert counted == ["A line.<end_of_turn>\n", "red<end_of_turn>\n"]


@pytest.mark.parametrize("instruction", [None, "Say what you see."])
def test_a_drawing_is_a_user_turn_and_its_caption_counts(instruction: str | None, tokenizer: Any) -> None:
    from lora_jobs.training.data import SVG_INSTRUCTION

    row = {"svg": SVG, "caption": "A small red circle."}
    text, counted = split_loss(row, tokenizer, format="svg_caption", instruction=instruction)
    assert text == (
        f"<bos><start_of_turn>user\n{instruction or SVG_INSTRUCTION}\n\n{SVG}<end_of_turn>\n"
        "<start_of_turn>model\nA small red circle.<end_of_turn>\n"
    )
    assert counted == ["A small red circle.<end_of_turn>\n"]


def test_what_does_not_fit_is_counted_and_left_out_never_cut(tokenizer: Any, tmp_path: Path) -> None:
    from lora_jobs.training.data import load_examples

    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": SVG * 9, "completion": "b"},
        {"prompt": "c", "completion": "d"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = load_examples(str(path), DataSpec(train=str(path), max_length=40), tokenizer)
    assert (examples.total, examples.too_long, examples.empty) == (3, 1, 0)
    assert [tokenizer.decode(ids) for ids in examples.dataset["input_ids"]] == ["ab<eos>", "cd<eos>"]


def test_a_model_without_a_chat_template_is_refused(tiny: Path) -> None:
    from transformers import AutoTokenizer

    from lora_jobs.training.data import render_row

    bare = AutoTokenizer.from_pretrained(tiny / "models" / "tiny_gemma2")
    bare.chat_template = None
    with pytest.raises(SpecError, match="has no chat template"):
        render_row({"svg": SVG, "caption": "x"}, DataSpec(train="x", format="svg_caption"), bare)


def test_a_template_that_rewrites_earlier_turns_is_refused(tiny: Path) -> None:
    from transformers import AutoTokenizer

    from lora_jobs.training.data import render_chat

    forgetful = AutoTokenizer.from_pretrained(tiny / "models" / "tiny_gemma2")
    forgetful.chat_template = "{% for message in messages %}{{ message.content if loop.last else '...' }}{% endfor %}"
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    with pytest.raises(SpecError, match="writes turn 2 differently when more follow"):
        render_chat(turns, forgetful)


@pytest.mark.parametrize("trainer", ["trl", "transformers"])
def test_the_adapter_loads_with_peft_and_has_the_loss_that_was_recorded(
    trainer: str, ranks: RankServer, make_run: Callable[..., Run], tokenizer: Any, tiny: Path
) -> None:
    """Recomputed with plain PEFT and transformers, token by token, from nothing but the adapter's directory."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from tiny_runs import build_spec, read_logs

    from lora_jobs.runs import load_metrics
    from lora_jobs.training.data import load_examples

    sections: dict[str, Any] = {"training": {"trainer": trainer, "per_device_eval_batch_size": 1, "max_steps": 6}}
    run = make_run("reloaded-1", **sections)
    assert ranks.start(run, 1).wait() == [0], read_logs(run)
    recorded = next(row["eval_loss"] for row in load_metrics(run) if row.get("phase") == "after")

    model = AutoPeftModelForCausalLM.from_pretrained(run.adapter, dtype=torch.float32).eval()
    spec = build_spec(tiny, **sections)
    held_out = load_examples(str(spec.data.eval), spec.data, tokenizer).dataset
    losses = []
    for example in held_out:
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, labels[1:]).item())
    assert sum(losses) / len(losses) == pytest.approx(recorded, rel=1e-4)


def test_packing_trains(ranks: RankServer, make_run: Callable[..., Run]) -> None:
    from tiny_runs import read_logs

    from lora_jobs.runs import load_metrics

    """Several rows share a sequence, so an epoch of 64 rows in pairs has fewer steps."""
    steps = {}
    for packing in (False, True):
        training = {"max_steps": None, "num_train_epochs": 1, "save_steps": 100}
        run = make_run(f"packed-{packing:d}", data={"packing": packing, "max_length": 256}, training=training)
        assert ranks.start(run, 1).wait() == [0], read_logs(run)
        steps[packing] = [row["loss"] for row in load_metrics(run) if row["kind"] == "train"]
    assert len(steps[False]) == 32
    assert len(steps[True]) <= 16
    assert steps[True][-1] < steps[True][0]


@pytest.mark.parametrize("case", ["chat", "text", "prompt_completion", "svg_caption, Parquet"])
def test_every_format_trains_and_says_what_it_left_out(
    case: str, ranks: RankServer, make_run: Callable[..., Run], tiny: Path, tmp_path: Path
) -> None:
    """One row more than the others is too long: it is counted in the record and the log, and the rest is whole."""
    import datasets
    from tiny_runs import read_logs

    from lora_jobs.runs import load_metrics

    form, _, parquet = case.partition(", ")
    name = {"prompt_completion": "prompt", "svg_caption": "train"}.get(form, form)
    rows = [json.loads(line) for line in (tiny / "data" / "tiny" / f"{name}.jsonl").read_text().splitlines()]
    long = {key: value * 40 if isinstance(value, str) else value * 41 for key, value in rows[0].items()}
    path = tmp_path / ("rows.parquet" if parquet else "rows.jsonl")
    if parquet:
        datasets.Dataset.from_list([*rows, long]).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, long]))
    data = {"train": str(path), "eval": None, "format": form, "instruction": None}
    run = make_run("format-1", data=data, training={"max_steps": 6})
    assert ranks.start(run, 1).wait() == [0], read_logs(run)
    found = load_metrics(run)
    losses = [row["loss"] for row in found if row["kind"] == "train"]
    assert losses[-1] < losses[0]
    (note,) = [row for row in found if row.get("event") == "started"]
    assert note["data"]["train"] == {"examples": len(rows), "too_long": 1, "empty": 0}
    log = (run.logs / "attempt-1.out").read_text()
    assert f"train: {len(rows)} examples, 1 longer than max_length and 0 without completion left out" in log


def test_quantized_base_with_the_8_bit_optimizer_trains(ranks: RankServer, make_run: Callable[..., Run]) -> None:
    from tiny_runs import read_logs

    from lora_jobs.runs import load_metrics

    run = make_run(
        "quantized-1",
        model={"dtype": "bfloat16", "quantization": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}},
        lora={"target_modules": ["q_proj", "v_proj"], "lora_alpha": 32},
        data={"pad_to_multiple_of": 16},
        training={"max_steps": 3, "save_steps": 3, "bf16": True, "activation_checkpointing": True},
    )
    assert ranks.start(run, 1).wait() == [0], read_logs(run)
    losses = [row["loss"] for row in load_metrics(run) if row["kind"] == "train"]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
