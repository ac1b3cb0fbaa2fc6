"""What stops a training at an odd moment: set-up, the end of its time, a rank that stands still, a second writer."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from tiny_runs import RankServer, hash_adapter, read_logs, wait_for_step

from lora_jobs.checkpoints import ALLOWED_FILE
from lora_jobs.rendering.deepspeed import build_deepspeed_config
from lora_jobs.runs import EXIT_HANG, EXIT_SAVED, Run, load_attempts, load_lease, load_metrics
from lora_jobs.spec import load_spec, parse_spec, render_spec

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.train

ONE: dict[str, Any] = {"training": {"trainer": "transformers", "max_steps": 12}}
TWO: dict[str, Any] = {
    "training": {"trainer": "transformers", "max_steps": 2000, "save_steps": 5},
    "resources": {"gpus_per_node": 2},
    "resume": {"hang_seconds": 5},
}


def find_note(run: Run, event: str) -> dict[str, Any]:
    (note,) = [row for row in load_metrics(run) if row.get("event") == event]
    return note


def test_a_signal_during_the_set_up_ends_the_job_before_its_first_step(
    ranks: RankServer, make_run: Callable[..., Run]
) -> None:
    run = make_run("setup-1", training={"max_steps": 12}, resources={"gpus_per_node": 2})
    job = ranks.start(run, 2)
    deadline = time.monotonic() + 120
    while not (load_attempts(run) and job.listens(1)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    job.kill(signal.SIGTERM, ranks=[1])
    assert job.wait() == [EXIT_SAVED] * 2, read_logs(run)
    (attempt,) = load_attempts(run)
    assert (attempt.state, attempt.cause, attempt.last_committed_step) == ("SAVED", "saved", None)
    assert [row for row in load_metrics(run) if row["kind"] == "train"] == []
    assert load_lease(run) is None


def test_a_job_saves_by_itself_when_another_step_would_not_fit(ranks: RankServer, make_run: Callable[..., Run]) -> None:
    """No signal at all: only the end time that the batch script has read."""
    run = make_run("late-1", training={"trainer": "transformers", "max_steps": 5000, "save_steps": 5000})
    end = time.time() + 45
    job = ranks.start_slurm_task(run, "4711", LORA_JOBS_END_TIME=f"{end:.0f}")
    assert job.wait() == [EXIT_SAVED], read_logs(run)
    assert time.time() < end
    note = find_note(run, "saved")
    assert note["signal"].startswith("the time limit")
    assert (run.checkpoints / f"checkpoint-{note['step']}" / "MANIFEST.json").exists()


def test_a_rank_that_stands_still_ends_the_others_with_their_stacks(
    ranks: RankServer, make_run: Callable[..., Run]
) -> None:
    run = make_run("still-1", **TWO)
    job = ranks.start(run, 2)
    wait_for_step(run, 12, commits=10)
    job.kill(signal.SIGSTOP, ranks=[1])
    deadline = time.monotonic() + 200
    while job.pids[0] not in job.codes:
        code = ranks.ask({"poll": job.pids[0]})["code"]
        job.codes.update({} if code is None else {job.pids[0]: code})
        assert time.monotonic() < deadline, read_logs(run)
        time.sleep(0.1)
    job.kill(signal.SIGKILL, ranks=[1])
    assert job.wait() == [EXIT_HANG, -signal.SIGKILL]
    assert find_note(run, "hang")["rank"] == 0
    log = (run.logs / "attempt-1.err").read_text()
    assert "rank 0: no progress for" in log
    assert "in run_training" in log


def change_spec(run: Run, allowed: dict[str, Any], **changes: dict[str, Any]) -> None:
    """What `resume` writes into a run's directory."""
    spec = load_spec(run.spec_path)
    values = spec.to_values()
    for section, keys in changes.items():
        values[section].update(keys)
    changed = parse_spec(json.dumps(values), source="test")
    run.spec_path.write_text(render_spec(changed))
    (run.directory / ALLOWED_FILE).write_text(json.dumps(allowed))
    if (config := build_deepspeed_config(changed)) is not None:
        run.deepspeed_path.write_text(json.dumps(config))


def test_two_processes_to_one_is_bit_exact_and_the_next_resume_is_plain(
    ranks: RankServer, make_run: Callable[..., Run]
) -> None:
    """ZeRO-2 without dropout, accumulation doubled; killed once more after the conversion."""
    sections: dict[str, Any] = {
        "deepspeed": {"zero_stage": 2},
        "lora": {"lora_dropout": 0.0},
        "training": {"max_steps": 16, "save_steps": 4},
        "resources": {"gpus_per_node": 2},
    }
    whole = make_run("whole-1", **sections)
    assert ranks.start(whole, 2).wait() == [0, 0], read_logs(whole)
    run = make_run("fewer-1", **sections)
    job = ranks.start(run, 2)
    wait_for_step(run, 5, commits=4)
    job.kill(signal.SIGKILL)
    job.wait()
    world = {"resources.gpus_per_node": 1, "training.gradient_accumulation_steps": 2}
    change_spec(run, world, resources={"gpus_per_node": 1}, training={"gradient_accumulation_steps": 2})
    alone = ranks.start(run, 1)
    wait_for_step(run, 13, commits=12)
    alone.kill(signal.SIGKILL)
    alone.wait()
    shutil.rmtree(run.directory / "converted", ignore_errors=True)
    assert ranks.start(run, 1).wait() == [0], read_logs(run)
    log = (run.logs / "attempt-2.out").read_text()
    assert "to 1 process(es)" in log
    assert "converting" not in (run.logs / "attempt-3.out").read_text()
    assert not (run.directory / "converted").exists()
    assert hash_adapter(run) == hash_adapter(whole)


def test_a_changed_learning_rate_takes_effect_and_only_when_it_is_allowed(
    ranks: RankServer, make_run: Callable[..., Run]
) -> None:
    run = make_run("rate-1", training={"trainer": "transformers", "max_steps": 12, "lr_scheduler_type": "linear"})
    job = ranks.start(run, 1)
    wait_for_step(run, 5, commits=4)
    job.kill(signal.SIGKILL)
    job.wait()
    change_spec(run, {}, training={"learning_rate": 0.002})
    assert ranks.start(run, 1).wait() == [5]
    assert "this changes how the run trains on: training.learning_rate" in str(load_attempts(run)[-1].reason)
    change_spec(run, {"training.learning_rate": 0.002}, training={"learning_rate": 0.002})
    assert ranks.start(run, 1).wait() == [0], read_logs(run)
    attempt = load_attempts(run)[-1]
    rates = {
        row["step"]: row["learning_rate"]
        for row in load_metrics(run)
        if row["kind"] == "train" and row["attempt"] == attempt.number
    }
    assert len(rates) >= 4
    assert rates == {step: pytest.approx(0.002 * (13 - step) / 12) for step in rates}


def test_a_second_job_of_a_run_in_training_is_refused_and_harms_nothing(
    ranks: RankServer, make_run: Callable[..., Run]
) -> None:
    alone = make_run("alone-1", **ONE)
    assert ranks.start(alone, 1).wait() == [0]
    run = make_run("shared-1", **ONE)
    first = ranks.start(run, 1)
    wait_for_step(run, 1)
    os.kill(first.pids[0], signal.SIGSTOP)  # it lives, however slow the second one starts
    second = ranks.start(run, 1)
    assert second.wait() == [5]
    os.kill(first.pids[0], signal.SIGCONT)
    assert first.wait() == [0], read_logs(run)
    refused = load_attempts(run)[-1]
    assert (refused.cause, "is being trained by job test" in str(refused.reason)) == ("second_writer", True)
    assert hash_adapter(run) == hash_adapter(alone)


def test_data_loading_workers_outlive_a_signal_to_every_process(
    ranks: RankServer, make_run: Callable[..., Run]
) -> None:
    """Slurm signals every process of a step. Twice, as at a preemption near the time limit."""
    sections = {"training": {**ONE["training"], "dataloader_num_workers": 2, "max_steps": 40, "save_steps": 40}}
    whole = make_run("whole-1", **sections)
    assert ranks.start(whole, 1).wait() == [0]
    run = make_run("workers-1", **sections)
    job = ranks.start(run, 1)
    wait_for_step(run, 3)
    rank = psutil.Process(job.pids[0])
    children = rank.children(recursive=True)
    for number in (signal.SIGTERM, signal.SIGUSR2):
        for process in [*children, rank]:
            process.send_signal(number)
    assert len(children) >= 2
    assert job.wait() == [EXIT_SAVED], read_logs(run)
    assert ranks.start(run, 1).wait() == [0], read_logs(run)
    assert hash_adapter(run) == hash_adapter(whole)
