"""Numbers that must be equal: merged and adapted models, accumulated and whole batches; what a finished run states."""

from __future__ import annotations

import json
import math
import signal
import sqlite3
import time
from contextlib import closing
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from tiny_runs import build_spec, read_logs, wait_for_step

from lora_jobs.runs import EXIT_SAVED, load_attempts, load_metrics
from lora_jobs.units import format_gib

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tiny_runs import RankServer

    from lora_jobs.runs import Run

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "tiny_gemma2": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "tiny_gemma3": {"use_rslora": True},
    "tiny_llama": {"use_dora": True, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 4}},
    "tiny_qwen2": {"modules_to_save": ["lm_head"], "bias": "none"},
    "tiny_gemma2, two copies": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "tiny_mistral": {"init_lora_weights": "gaussian", "layers_to_transform": [0, 2]},
}


def train(ranks: RankServer, run: Run, count: int = 1) -> list[dict[str, Any]]:
    """Train to the end; the rows of metrics.jsonl."""
    assert ranks.start(run, count).wait() == [0] * count, read_logs(run)
    return load_metrics(run)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_familys_adapter_reloads_and_merges_exactly(
    name: str, ranks: RankServer, make_run: Callable[..., Run], tiny: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    path = str(tiny / "models" / name.partition(",")[0])
    training = {"max_steps": 3, "save_steps": 3, "activation_checkpointing": True}
    model = {"name_or_path": path, "attn_implementation": "eager"}
    run = make_run("family-1", model=model, lora={"target_modules": SEVEN, **ADAPTERS[name]}, training=training)
    rows = train(ranks, run)
    before, after = (row["eval_loss"] for row in rows if row["kind"] == "eval")
    assert after < before - 0.05

    ids = torch.arange(6, 46).reshape(2, 20)
    with torch.no_grad():
        options = {"attn_implementation": "eager", "dtype": torch.float32}
        base = AutoModelForCausalLM.from_pretrained(path, **options).eval()
        untrained = base(input_ids=ids).logits.clone()
        adapted = PeftModel.from_pretrained(base, run.adapter).eval()
        wanted = adapted(input_ids=ids).logits.clone()
        merged = adapted.merge_and_unload()
        found = merged(input_ids=ids).logits
    assert (wanted - untrained).abs().max() > 0.05
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    tied = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert tied is (name in ("tiny_gemma2", "tiny_gemma3", "tiny_llama"))


@pytest.mark.parametrize("trainer", ["trl", "transformers"])
def test_accumulated_batches_train_as_one_whole_batch(
    trainer: str, ranks: RankServer, make_run: Callable[..., Run]
) -> None:
    """Completions of unequal length: a mean of the micro-batches' means would be another loss."""
    found = []
    for number, (batch, accumulation, count) in enumerate([(16, 1, 1), (1, 16, 1), (2, 4, 2)], start=1):
        training = {
            "trainer": trainer, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation,
            "max_steps": 3, "save_steps": 3, "max_grad_norm": 0.0,
        }  # fmt: skip
        resources = {"gpus_per_node": count}
        run = make_run(f"batch-{number}", training=training, lora={"lora_dropout": 0.0}, resources=resources)
        rows = [row for row in train(ranks, run, count) if row["kind"] == "train"]
        found.append([(row["loss"], row["grad_norm"]) for row in rows])
    whole, *accumulated = found
    for steps in accumulated:
        for (loss, norm), (wanted_loss, wanted_norm) in zip(steps, whole, strict=True):
            assert loss == pytest.approx(wanted_loss, rel=2e-4)
            assert norm == pytest.approx(wanted_norm, rel=2e-3)


def test_packed_rows_train_as_the_same_rows_apart(ranks: RankServer, make_run: Callable[..., Run], tiny: Path) -> None:
    """One step over all rows, prompts masked: no token sees another document, its window and positions are its own."""
    found = []
    for number, (attention, packed) in enumerate([("sdpa", False), ("sdpa", True), ("eager", True)], start=1):
        model = {"name_or_path": str(tiny / "models" / "tiny_gemma3"), "attn_implementation": attention}
        # Where no rows were packed, 48 batches of one would end before the last of the 64.
        training = {
            "per_device_train_batch_size": 8 if not packed else 1, "gradient_accumulation_steps": 48, "max_steps": 1,
            "save_steps": 1, "max_grad_norm": 0.0,
        }  # fmt: skip
        data = {"packing": packed, "max_length": 512 if packed else 160, "eval": None}
        lora = {"lora_dropout": 0.0, "init_lora_weights": False}
        run = make_run(f"packed-{number}", model=model, training=training, lora=lora, data=data)
        (step,) = [row for row in train(ranks, run) if row["kind"] == "train"]
        assert step["epoch"] == 1
        found.append(step)
    apart, *packed_steps = found
    for step in packed_steps:
        assert step["loss"] == pytest.approx(apart["loss"], rel=1e-5)
        assert step["grad_norm"] == pytest.approx(apart["grad_norm"], rel=1e-4)


def test_a_step_of_two_thousand_batches(ranks: RankServer, make_run: Callable[..., Run], tmp_path: Path) -> None:
    """One optimizer step of 2,048 single rows is a step of 16 batches of 128 of them."""
    rows = "".join(json.dumps({"text": f"{'word ' * (1 + number % 3)}{number % 7}"}) + "\n" for number in range(2048))
    (tmp_path / "train.jsonl").write_text(rows)
    data = {"train": str(tmp_path / "train.jsonl"), "eval": None, "format": "text", "instruction": None}
    found = []
    for number, (batch, accumulation) in enumerate([(1, 2048), (128, 16)], start=1):
        training = {
            "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation,
            "max_steps": 1, "save_steps": 1,
        }  # fmt: skip
        run = make_run(f"long-{number}", training=training, lora={"lora_dropout": 0.0}, data=data)
        (step,) = [row for row in train(ranks, run) if row["kind"] == "train"]
        found.append(step)
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=2e-4)
    assert found[0]["grad_norm"] == pytest.approx(found[1]["grad_norm"], rel=2e-3)


@pytest.mark.parametrize("trainer", ["trl", "transformers"])
def test_trained_tokens_merge_exactly_where_the_trainer_takes_them(
    trainer: str, ranks: RankServer, make_run: Callable[..., Run], tiny: Path
) -> None:
    """On an untied model both trainers take them; a tied one is refused by check for TRL."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    name = "tiny_qwen2" if trainer == "trl" else "tiny_gemma3"
    path = str(tiny / "models" / name)
    training = {"max_steps": 2, "save_steps": 2, "trainer": trainer}
    run = make_run(
        "tokens-1", model={"name_or_path": path}, lora={"trainable_token_indices": [4, 5]}, training=training
    )
    train(ranks, run)
    ids = torch.tensor([[2, 4, 30, 5, 40, 41]])
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), run.adapter
        )
        wanted = adapted.eval()(input_ids=ids).logits.clone()
        found = adapted.merge_and_unload()(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2])
def test_final_metrics_beside_their_targets(count: int, ranks: RankServer, make_run: Callable[..., Run]) -> None:
    from sacrebleu import corpus_bleu

    training = {
        "max_steps": 40, "learning_rate": 0.02, "final_metrics": ["bleu"], "final_examples": 5, "max_new_tokens": 12,
        "targets": {"eval_loss": 0.01, "perplexity": 500, "bleu": 0.5},
    }  # fmt: skip
    run = make_run("final-1", training=training, resources={"gpus_per_node": count})
    rows = train(ranks, run, count)
    (final,) = [row for row in rows if row["kind"] == "final"]
    (after,) = [row for row in rows if row["kind"] == "eval" and row["phase"] == "after"]
    reached = final["metrics"]
    assert reached["eval_loss"] == after["eval_loss"]
    assert reached["perplexity"] == pytest.approx(math.exp(after["eval_loss"]))
    assert 0 <= reached["bleu"] <= 100
    assert final["targets"]["bleu"] == {"expected": 0.5, "reached": reached["bleu"], "met": reached["bleu"] >= 0.5}
    assert (final["targets"]["eval_loss"]["met"], final["targets"]["perplexity"]["met"]) == (False, True)
    assert "(expected 0.01: NOT reached)" in (run.logs / "attempt-1.out").read_text()
    from lora_jobs.training.measures import score_bleu

    answers, wanted = ["A large red square.", "A small line."], ["A large red square.", "A small blue line."]
    assert score_bleu(answers, wanted) == corpus_bleu(answers, [wanted]).score
    assert score_bleu(wanted, wanted) == pytest.approx(100)


def test_each_answer_of_the_final_measure_is_a_sign_of_life(tiny: Path) -> None:
    """The hang watch gives the finish an hour in all, unless it hears that a rank gets on."""
    from transformers import AutoModelForCausalLM

    from lora_jobs.training.agreement import Agreement
    from lora_jobs.training.data import load_examples
    from lora_jobs.training.measures import answer_examples
    from lora_jobs.training.model import load_tokenizer

    spec = build_spec(tiny, training={"final_metrics": ["bleu"], "final_examples": 3, "max_new_tokens": 2})
    tokenizer = load_tokenizer(spec.model)
    assert spec.data.eval is not None
    trainer: Any = SimpleNamespace(
        eval_dataset=load_examples(spec.data.eval, spec.data, tokenizer).dataset,
        args=SimpleNamespace(process_index=0, world_size=1),
        model=AutoModelForCausalLM.from_pretrained(spec.model.name_or_path),
        processing_class=tokenizer,
    )
    beats: list[float] = []
    answers = answer_examples(trainer, spec.training, Agreement(1), beat=lambda: beats.append(time.monotonic()))
    assert (len(answers), len(beats)) == (3, 3)
    assert beats == sorted(set(beats))


def test_examples_without_prompts_leave_bleu_unmeasured(
    ranks: RankServer, make_run: Callable[..., Run], tiny: Path, tmp_path: Path
) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "", "completion": "A large red square."}\n')
    data = {"train": str(tiny / "data/tiny/prompt.jsonl"), "eval": str(held_out), "format": "prompt_completion"}
    training = {"max_steps": 1, "save_steps": 1, "final_metrics": ["bleu"], "targets": {"bleu": 18, "eval_loss": 100}}
    rows = train(ranks, make_run("unprompted-1", training=training, data=data))
    (note,) = [row for row in rows if row.get("event") == "bleu_not_measured"]
    assert note["reason"] == "none of the held-out examples has a prompt before its answer"
    (final,) = [row for row in rows if row["kind"] == "final"]
    assert sorted(final["metrics"]) == ["eval_loss", "perplexity"]
    assert final["targets"]["bleu"] == {"expected": 18, "reached": None, "met": False}
    assert final["targets"]["eval_loss"]["met"]


def test_tensorboard_holds_every_step_also_of_a_resumed_run(ranks: RankServer, make_run: Callable[..., Run]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = make_run("board-1", training={"max_steps": 40, "eval_steps": 20})
    job = ranks.start(run, 1)
    wait_for_step(run, 2)
    job.kill(signal.SIGTERM)
    assert job.wait() == [EXIT_SAVED], read_logs(run)
    rows = train(ranks, run)
    assert [attempt.state for attempt in load_attempts(run)] == ["SAVED", "COMPLETED"]
    events = EventAccumulator(str(run.directory / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("eval/loss")][:3] == [0, 20, 40]
    trained = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in trained] == list(range(1, 41))
    for key in ("loss", "tokens_per_second", "memory_allocated_bytes", "memory_reserved_bytes", "host_memory_bytes"):
        found = events.Scalars(f"train/{key}")
        assert [event.step for event in found] == list(range(1, 41))
        assert [event.value for event in found] == pytest.approx([row[key] for row in trained], rel=1e-6)


def test_trackio_keeps_its_records_in_the_run_where_there_is_no_internet(
    ranks: RankServer, make_run: Callable[..., Run], tmp_path: Path
) -> None:
    """The real client, without a Space: every step and every evaluation, under the run's name."""
    run = make_run("board-1", training={"max_steps": 2, "report_to": ["trackio"]})
    environment = {"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    assert ranks.start(run, 1, **environment).wait() == [0], read_logs(run)
    with closing(sqlite3.connect(run.directory / "trackio" / "lora-jobs.db")) as database:
        kept = database.execute("SELECT run_name, metrics FROM metrics ORDER BY id").fetchall()
    assert {name for name, _ in kept} == {"board-1"}
    logged = [json.loads(metrics) for _, metrics in kept]
    rows = load_metrics(run)
    for key, name in (("loss", "train/loss"), ("tokens_per_second", "train/tokens_per_second")):
        assert [row[name] for row in logged if name in row] == [row[key] for row in rows if row["kind"] == "train"]
    assert [row["eval/loss"] for row in logged if "eval/loss" in row] == [
        row["eval_loss"] for row in rows if row["kind"] == "eval"
    ]


def test_wandb_keeps_its_records_in_the_run_where_there_is_no_internet(
    ranks: RankServer, make_run: Callable[..., Run], tmp_path: Path
) -> None:
    """The real client, offline: every step and every evaluation, that of the finished adapter too."""
    run = make_run("board-1", training={"max_steps": 2, "report_to": ["wandb"]})
    environment = {"WANDB_MODE": "offline", "HOME": str(tmp_path)}
    assert ranks.start(run, 1, **environment).wait() == [0], read_logs(run)
    (path,) = run.directory.glob("wandb/offline-run-*-board-1/run-board-1.wandb")
    kept = path.read_bytes()
    rows = [row for row in load_metrics(run) if row["kind"] in ("train", "eval")]
    assert [row["kind"] for row in rows] == ["eval", "train", "train", "eval"]
    wanted = [row["loss"] if row["kind"] == "train" else row["eval_loss"] for row in rows]
    wanted += [row[key] for row in rows[1:3] for key in ("tokens_per_second", "host_memory_bytes")]
    assert [value for value in wanted if json.dumps(value).encode() not in kept] == []


@pytest.mark.parametrize(
    ("schedule", "more"), [("cosine_with_restarts", {"num_cycles": 2}), ("polynomial", {"power": 2})]
)
def test_the_schedule_is_that_of_transformers(
    schedule: str, more: dict[str, float], ranks: RankServer, make_run: Callable[..., Run]
) -> None:
    import torch
    from transformers import get_scheduler

    training = {"lr_scheduler_type": schedule, "lr_scheduler_kwargs": more, "warmup_ratio": 0.25, "max_steps": 8}
    rows = train(ranks, make_run("rates-1", training=training, data={"eval": None}))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    wanted = get_scheduler(schedule, optimizer, 2, 8, scheduler_specific_kwargs=more)
    rates = []
    for _ in range(8):
        rates.append(wanted.get_last_lr()[0])
        optimizer.step()
        wanted.step()
    assert [row["learning_rate"] for row in rows if row["kind"] == "train"] == pytest.approx(rates)


def test_no_tracker_leaves_nothing(ranks: RankServer, make_run: Callable[..., Run]) -> None:
    run = make_run("silent-1", training={"max_steps": 1, "report_to": []})
    train(ranks, run)
    assert not list(run.directory.rglob("*tfevents*"))


def test_where_trackers_write_and_when_they_are_offline(make_run: Callable[..., Run]) -> None:
    from lora_jobs.training.reports import is_offline, place_reports

    run = make_run("placed-1")
    environment = {"HF_HUB_OFFLINE": "1", "WANDB_PROJECT": "mine"}
    place_reports(run, environment)
    assert environment["WANDB_MODE"] == "offline"
    assert environment["WANDB_PROJECT"] == "mine"
    assert environment["WANDB_RUN_ID"] == "placed-1"
    assert environment["TENSORBOARD_LOGGING_DIR"] == str(run.directory / "tensorboard")
    assert not is_offline({"HF_HUB_OFFLINE": "0"})
    online: dict[str, str] = {}
    place_reports(run, online)
    assert "WANDB_MODE" not in online


def test_memory_and_speed_are_in_every_row(ranks: RankServer, make_run: Callable[..., Run]) -> None:
    run = make_run("measured-1", training={"max_steps": 2})
    run.estimate_path.write_text(json.dumps({"estimate": {"peak_bytes": 3 * 2**30, "allocated_peak_bytes": 2**30}}))
    rows = train(ranks, run)
    lines = [line for line in (run.logs / "attempt-1.out").read_text().splitlines() if line.startswith("step ")]
    for row, line in zip((row for row in rows if row["kind"] == "train"), lines, strict=True):
        assert row["memory_predicted_bytes"] == 3 * 2**30  # without a GPU that of the whole process
        assert line.endswith(f"memory {format_gib(row['host_memory_bytes'])} of 3.0 GiB predicted")
        assert {"loss", "learning_rate", "grad_norm", "memory_allocated_bytes", "memory_reserved_bytes"} <= row.keys()
        assert row["tokens_per_second"] > 0
        assert row["host_memory_bytes"] > 100_000_000
