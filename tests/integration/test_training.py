"""Training on real ranks: what is interrupted and resumed ends with the same adapter, byte for byte."""

from __future__ import annotations

import json
import shutil
import signal
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_runs import Job, RankServer, hash_adapter, read_logs, wait_for_step

from lora_jobs.checkpoints import verify_checkpoint
from lora_jobs.runs import EXIT_NO_CHECKPOINT, EXIT_SAVED, Run, load_attempts, load_metrics

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.train

ONE: dict[str, Any] = {"training": {"trainer": "transformers", "gradient_accumulation_steps": 2, "max_steps": 20}}
DDP: dict[str, Any] = {
    "training": {"trainer": "transformers", "activation_checkpointing": True, "max_steps": 20},
    "resources": {"gpus_per_node": 2},
}
TWO: dict[str, Any] = {
    "deepspeed": {"zero_stage": 2},
    "training": {"eval_steps": 4, "max_steps": 20},
    "lora": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "resources": {"gpus_per_node": 2},
}


KINDS: dict[str, tuple[dict[str, Any], int]] = {"one": (ONE, 1), "ddp": (DDP, 2), "two": (TWO, 2)}


def list_eval_phases(run: Run) -> list[str]:
    return [row["phase"] for row in load_metrics(run) if row["kind"] == "eval"]


def train_through(ranks: RankServer, run: Run, count: int) -> Run:
    """Train a run without interruption."""
    assert ranks.start(run, count).wait() == [0] * count, read_logs(run)
    return run


@pytest.fixture(scope="module")
def whole(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Callable[[str], Run]:
    """The uninterrupted runs that the others are compared with, each trained once."""
    from tiny_runs import create_tiny_run

    root = tmp_path_factory.mktemp("whole")
    made: dict[str, Run] = {}

    def get(kind: str) -> Run:
        if kind not in made:
            sections, count = KINDS[kind]
            made[kind] = train_through(ranks, create_tiny_run(root, f"{kind}-1", tiny, **sections), count)
        return made[kind]

    return get


def test_a_run_ends_with_an_adapter_its_record_and_two_checkpoints(whole: Callable[[str], Run]) -> None:
    run = whole("two")
    (attempt,) = load_attempts(run)
    assert (attempt.state, attempt.exit_code, attempt.first_step, attempt.last_committed_step) == (
        "COMPLETED",
        0,
        0,
        20,
    )
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["checkpoint-16", "checkpoint-20"]
    assert verify_checkpoint(run.checkpoints / "checkpoint-20").good
    assert verify_checkpoint(run.adapter).good
    rows = load_metrics(run)
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 21))
    assert list_eval_phases(run) == ["before", *["during"] * 5, "after"]
    before, after = (row["eval_loss"] for row in rows if row["kind"] == "eval" and row["phase"] in ("before", "after"))
    assert after < before - 1
    (sample,) = [row for row in rows if row["kind"] == "sample"]
    assert sample["with_adapter"] != sample["without_adapter"]
    assert sample["expected"] == "A large red square."
    log = (run.logs / "attempt-1.out").read_text()
    assert "step 12/20  loss " in log
    assert "\r" not in log
    assert "Warning" not in (run.logs / "attempt-1.err").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_kill_9_then_resume_gives_the_same_adapter(
    kind: str, ranks: RankServer, make_run: Callable[..., Run], whole: Callable[[str], Run]
) -> None:
    sections, count = KINDS[kind]
    run = make_run("killed-1", **sections)
    job = ranks.start(run, count)
    wait_for_step(run, 6, commits=4)
    job.kill(signal.SIGKILL)
    assert job.wait() == [-signal.SIGKILL] * count
    assert load_attempts(run)[0].state == "RUNNING"

    train_through(ranks, run, count)

    second = load_attempts(run)[1]
    assert second.resume_from is not None
    assert int(second.resume_from.removeprefix("checkpoint-")) == second.first_step >= 4
    assert hash_adapter(run) == hash_adapter(whole(kind))
    assert list_eval_phases(run).count("before") == 1


def test_kill_9_before_the_first_checkpoint_starts_over_to_the_same_adapter(
    ranks: RankServer, make_run: Callable[..., Run], whole: Callable[[str], Run]
) -> None:
    """The evaluation before training is not repeated, and its absence must not shift the random numbers."""
    run = make_run("early-1", training={**ONE["training"], "save_steps": 20})
    job = ranks.start(run, 1)
    wait_for_step(run, 1)
    job.kill(signal.SIGKILL)
    job.wait()

    train_through(ranks, run, 1)

    assert load_attempts(run)[1].resume_from is None
    assert list_eval_phases(run).count("before") == 1
    assert hash_adapter(run) == hash_adapter(whole("one"))


@pytest.mark.parametrize(
    ("number", "signalled"),
    [(signal.SIGTERM, [0, 1]), (signal.SIGUSR2, [1])],
    ids=["SIGTERM to both", "SIGUSR2 to one"],
)
def test_a_signal_saves_at_once_and_resumes_to_the_same_adapter(
    number: signal.Signals,
    signalled: list[int],
    ranks: RankServer,
    make_run: Callable[..., Run],
    whole: Callable[[str], Run],
) -> None:
    run = make_run("signalled-1", **TWO)
    job = ranks.start(run, 2)
    wait_for_step(run, 6)
    job.kill(number, ranks=signalled)
    assert job.wait() == [EXIT_SAVED, EXIT_SAVED], read_logs(run)

    (attempt,) = load_attempts(run)
    assert (attempt.state, attempt.exit_code) == ("SAVED", EXIT_SAVED)
    step = attempt.last_committed_step
    assert step is not None
    assert 6 <= step < 20
    assert verify_checkpoint(run.checkpoints / f"checkpoint-{step}").good
    assert not run.adapter.exists()

    train_through(ranks, run, 2)

    assert load_attempts(run)[1].first_step == step
    assert hash_adapter(run) == hash_adapter(whole("two"))


def test_a_signal_before_the_first_step_leaves_the_evaluation(
    ranks: RankServer, make_run: Callable[..., Run], whole: Callable[[str], Run]
) -> None:
    run = make_run("waiting-1", **ONE)
    job = ranks.start(run, 1)
    while not load_metrics(run):
        time.sleep(0.01)
    job.kill(signal.SIGTERM)
    assert job.wait() == [EXIT_SAVED], read_logs(run)

    (attempt,) = load_attempts(run)
    assert (attempt.state, attempt.reason, attempt.last_committed_step) == ("SAVED", "saved after SIGTERM", None)
    assert [row["kind"] for row in load_metrics(run)] == ["note", "note"]

    train_through(ranks, run, 1)
    assert hash_adapter(run) == hash_adapter(whole("one"))


def stop_after(ranks: RankServer, run: Run, count: int, step: int, *, row: str = "train") -> Job:
    """Train until past a step, then SIGTERM: a run with a checkpoint to resume from."""
    job = ranks.start(run, count)
    wait_for_step(run, step, row=row)
    job.kill(signal.SIGTERM)
    assert job.wait() == [EXIT_SAVED] * count, read_logs(run)
    return job


def test_a_damaged_newest_checkpoint_is_passed_over(
    ranks: RankServer, make_run: Callable[..., Run], whole: Callable[[str], Run]
) -> None:
    """One flipped bit in an optimizer shard: stock resume would go on from it without a word."""
    run = make_run("damaged-1", **TWO)
    stop_after(ranks, run, 2, 9)
    newest, older = sorted(run.checkpoints.iterdir(), key=lambda path: -int(path.name.split("-")[1]))[:2]
    shard = next(newest.glob("global_step*/*zero_pp_rank_1*optim_states.pt"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)

    train_through(ranks, run, 2)

    assert load_attempts(run)[1].resume_from == older.name
    assert f"{newest.name}: " in (run.logs / "attempt-2.out").read_text()
    assert hash_adapter(run) == hash_adapter(whole("two"))


def test_without_a_good_checkpoint_nothing_is_trained(ranks: RankServer, make_run: Callable[..., Run]) -> None:
    run = make_run("lost-1", **ONE)
    stop_after(ranks, run, 1, 2)
    for checkpoint in run.checkpoints.iterdir():
        (checkpoint / "trainer_state.json").write_text("{}")

    assert ranks.start(run, 1).wait() == [EXIT_NO_CHECKPOINT]

    last = load_attempts(run)[-1]
    assert (last.state, last.exit_code) == ("FAILED", EXIT_NO_CHECKPOINT)
    assert "no good checkpoint" in (last.reason or "")
    assert not run.adapter.exists()


@pytest.mark.parametrize("kind", ["one", "two"])
def test_a_run_that_was_killed_after_its_last_step_only_finishes(
    kind: str, ranks: RankServer, make_run: Callable[..., Run], whole: Callable[[str], Run]
) -> None:
    sections, count = KINDS[kind]
    run = make_run("late-1", **sections)
    train_through(ranks, run, count)
    shutil.rmtree(run.adapter)
    trained = sum(row["kind"] == "train" for row in load_metrics(run))

    train_through(ranks, run, count)

    assert sum(row["kind"] == "train" for row in load_metrics(run)) == trained
    assert hash_adapter(run) == hash_adapter(whole(kind))


def test_early_stopping_counts_on_after_a_resume(ranks: RankServer, make_run: Callable[..., Run]) -> None:
    sections: dict[str, Any] = {
        "training": {
            "max_steps": 30,
            "eval_steps": 2,
            "save_steps": 2,
            "load_best_model_at_end": True,
            "early_stopping_patience": 5,
            # No improvement is enough: it stops at the sixth evaluation.
            "early_stopping_threshold": 10.0,
        }
    }
    straight = train_through(ranks, make_run("straight-1", **sections), 1)
    stopped = make_run("stopped-1", **sections)
    stop_after(ranks, stopped, 1, 7)
    train_through(ranks, stopped, 1)

    for run in (straight, stopped):
        assert max(row["step"] for row in load_metrics(run) if row["kind"] == "train") == 12
    assert hash_adapter(stopped) == hash_adapter(straight)
    state = json.loads((straight.checkpoints / "checkpoint-12" / "trainer_state.json").read_text())
    best = straight.checkpoints / f"checkpoint-{state['best_global_step']}" / "adapter_model.safetensors"
    assert (straight.adapter / "adapter_model.safetensors").read_bytes() == best.read_bytes()


def test_another_number_of_processes_is_refused(ranks: RankServer, make_run: Callable[..., Run]) -> None:
    run = make_run("resized-1", **TWO)
    stop_after(ranks, run, 2, 2)
    text = run.spec_path.read_text()
    run.spec_path.write_text(text.replace("gpus_per_node: 2", "gpus_per_node: 1"))
    assert ranks.start(run, 1).wait() == [5]
    assert "saved by 2 processes, this job has 1" in (load_attempts(run)[-1].reason or "")


def test_a_failing_rank_leaves_one_clear_reason(ranks: RankServer, make_run: Callable[..., Run]) -> None:
    run = make_run("broken-1", data={"max_length": 8})
    assert ranks.start(run, 1).wait() == [2]
    (attempt,) = load_attempts(run)
    assert attempt.state == "FAILED"
    assert "none of 64 examples can be used: 64 are longer than data.max_length 8 tokens" in (attempt.reason or "")
    assert "Traceback" not in (run.logs / "attempt-1.err").read_text()


def test_a_loss_that_is_no_number_ends_the_run_and_is_never_committed(
    ranks: RankServer, make_run: Callable[..., Run]
) -> None:
    run = make_run("diverged-1", training={"learning_rate": 1e30, "save_steps": 1, "max_grad_norm": 0.0})
    assert ranks.start(run, 1).wait() == [5]
    reason = load_attempts(run)[0].reason or ""
    assert reason.startswith("the loss is nan at step ")
    step = int(reason.split("step ")[1].split(":")[0])
    assert not (run.checkpoints / f"checkpoint-{step}").exists()


def test_a_slurm_job_sized_for_a_gpu_does_not_train_on_the_cpu(ranks: RankServer, make_run: Callable[..., Run]) -> None:
    run = make_run("no_gpu-1")
    run.estimate_path.write_text(json.dumps({"gpu": {"name": "A100-64"}}))
    assert ranks.start_slurm_task(run, "4711").wait() == [5]
    (note,) = load_metrics(run)
    assert (note["event"], note["attempt"]) == ("failed", 1)
    assert "shows no GPU to torch, and the job was sized for A100-64" in note["reason"]


def test_a_loss_that_is_not_finite_is_never_saved(ranks: RankServer, make_run: Callable[..., Run]) -> None:
    """Also between two log lines: the loss of every step that is saved is looked at."""
    run = make_run("nan-1", training={"learning_rate": 1e30, "max_steps": 12, "save_steps": 1, "logging_steps": 6})
    assert ranks.start(run, 1).wait() != [0]
    for checkpoint in run.checkpoints.glob("checkpoint-*"):
        for name, tensor in load_file(checkpoint / "adapter_model.safetensors").items():
            assert np.isfinite(tensor).all(), f"{checkpoint.name} {name}"
    assert "the loss is nan" in (load_attempts(run)[-1].reason or "")


def test_a_signal_during_an_evaluation_saves_that_very_step(ranks: RankServer, make_run: Callable[..., Run]) -> None:
    training = {"eval_steps": 6, "save_steps": 100, "max_steps": 400, "per_device_eval_batch_size": 1}
    run = make_run("evaluated-1", training=training)
    job = ranks.start(run, 1)
    wait_for_step(run, 6)
    job.kill(signal.SIGTERM)
    assert job.wait() == [85], read_logs(run)
    (checkpoint,) = run.checkpoints.glob("checkpoint-*")
    trained = max(row["step"] for row in load_metrics(run) if row["kind"] == "train")
    assert checkpoint.name == f"checkpoint-{trained}"


def load_evaluations(run: Run) -> set[tuple[int, float]]:
    return {(row["step"], row["eval_loss"]) for row in load_metrics(run) if row["kind"] == "eval"}


@pytest.mark.parametrize(("kind", "row"), [("one", "train"), ("two", "train"), ("one", "eval")])
def test_an_evaluation_that_a_signal_cuts_short_leaves_no_trace(
    kind: str, row: str, ranks: RankServer, make_run: Callable[..., Run]
) -> None:
    """Every step is evaluated. After a row "train" the signal falls into an evaluation, after "eval" into a step."""
    sections, count = KINDS[kind]
    training = {**sections["training"], "eval_steps": 1, "save_steps": 100, "max_steps": 12}
    training["per_device_eval_batch_size"] = 1 if row == "train" else 64
    run = make_run("cut-1", **{**sections, "training": training})
    stop_after(ranks, run, count, 4, row=row)
    step = load_attempts(run)[0].last_committed_step
    assert step == max(each["step"] for each in load_metrics(run) if each["kind"] == "train")

    train_through(ranks, run, count)

    straight = train_through(ranks, make_run("straight-1", **{**sections, "training": training}), count)
    assert hash_adapter(run) == hash_adapter(straight)
    assert load_evaluations(run) <= load_evaluations(straight)


def test_a_signal_within_a_long_step_does_not_wait_for_its_end(ranks: RankServer, make_run: Callable[..., Run]) -> None:
    training = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 512,
        "max_steps": 2,
        "save_steps": 1,
    }
    run = make_run("long-1", training=training)
    job = ranks.start(run, 1)
    wait_for_step(run, 1, commits=1)
    time.sleep(0.3)
    job.kill(signal.SIGTERM)
    assert job.wait() == [EXIT_SAVED], read_logs(run)
    (attempt,) = load_attempts(run)
    assert attempt.last_committed_step == 1
    assert attempt.reason == "saved after SIGTERM (step 2 was unfinished and will be repeated)"

    train_through(ranks, run, 1)

    straight = train_through(ranks, make_run("straight-1", training=training), 1)
    assert hash_adapter(run) == hash_adapter(straight)


@pytest.mark.parametrize(("sections", "count"), [({}, 1), ({"deepspeed": {"zero_stage": 2}}, 2)], ids=["one", "two"])
def test_the_best_weights_are_found_in_a_moved_run_and_verified(
    sections: dict[str, Any], count: int, ranks: RankServer, make_run: Callable[..., Run]
) -> None:
    """The first step has a learning rate of 0 and the second one far too high: the last step is not the best."""
    training: dict[str, Any] = {"max_steps": 2, "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    training |= {"learning_rate": 10.0, "warmup_steps": 6}
    sections = {**sections, "training": training, "resources": {"gpus_per_node": count}}
    run = train_through(ranks, make_run("moved-1", **sections), count)
    state = json.loads((run.checkpoints / "checkpoint-2" / "trainer_state.json").read_text())
    best = state["best_global_step"]
    assert best == 1
    first = hash_adapter(run)

    moved = Run(run.directory.with_name("moved-2"))
    run.directory.rename(moved.directory)
    shutil.rmtree(moved.adapter)
    train_through(ranks, moved, count)
    assert hash_adapter(moved) == first

    shutil.rmtree(moved.adapter)
    (moved.checkpoints / f"checkpoint-{best}" / "adapter_config.json").write_text("{}")
    train_through(ranks, moved, count)
    assert hash_adapter(moved) != first
    (note,) = [row for row in load_metrics(moved) if row.get("event") == "best_not_loaded"]
    assert (note["step"], "adapter_config.json" in note["reason"]) == (best, True)
