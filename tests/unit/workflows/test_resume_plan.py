"""`resume` without a good checkpoint: the base model only when it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_checkpoints import write_checkpoint, write_safetensors

from lora_jobs.checkpoints import commit_checkpoint, list_checkpoints
from lora_jobs.errors import CheckpointError, RunError
from lora_jobs.runs import (
    EXIT_NO_CHECKPOINT,
    STARTED_OVER_FILE,
    Run,
    begin_attempt,
    create_run,
    end_attempt,
    list_committed_steps,
)
from lora_jobs.training.attempt import choose_start
from lora_jobs.units import format_gib
from lora_jobs.workflows.resuming import change_run, plan_resume
from lora_jobs.workflows.resuming_memory import LOWER

SPEC = """
name: tiny
model: {name_or_path: smollm2-135m}
lora: {r: 4}
data: {train: PLACE/train.jsonl}
training: {max_steps: 10}
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("LORA_JOBS_HOME", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return create_run(tmp_path / "runs", "tiny-1", {"spec.yaml": SPEC.replace("PLACE", str(tmp_path))})


def add_attempt(run: Run, *, committed: int | None, code: int = 1, cause: str = "failed") -> None:
    job = f"test{code}"
    begin_attempt(run, job_id=job, restart_count=0, backend="local", host="here", resume_from=None, first_step=0)
    end_attempt(
        run,
        job_id=job,
        restart_count=0,
        exit_code=code,
        state="FAILED",
        reason="no good checkpoint",
        last_committed_step=committed,
        cause=cause,
    )


def add_checkpoint(run: Run, step: int, *, finite: bool = True) -> Path:
    directory = run.checkpoints / f"checkpoint-{step}"
    write_checkpoint(directory, step=step)
    if not finite:
        write_safetensors(directory / "adapter_model.safetensors", {"a": b"\xff" * 64})
    commit_checkpoint(directory, step=step, world_size=1)
    return directory


def test_a_run_that_committed_nothing_starts_from_the_base_model(run: Run) -> None:
    add_attempt(run, committed=None)
    plan = plan_resume("tiny-1")
    assert (plan.chosen, plan.step) == (None, 0)


def test_committed_work_that_is_gone_takes_from_scratch(run: Run) -> None:
    add_attempt(run, committed=8)
    with pytest.raises(CheckpointError, match="none of the checkpoints of tiny-1 is good: checkpoint-8: ") as raised:
        plan_resume("tiny-1")
    assert raised.value.message.endswith("checkpoint-8: it was committed, and is gone")
    plan = plan_resume("tiny-1", from_scratch=True)
    undo = change_run(run, {}, start_over=plan.chosen is None)
    assert list_committed_steps(run) == frozenset()
    assert plan_resume("tiny-1").chosen is None
    undo()
    assert list_committed_steps(run) == {8}
    assert not (run.directory / STARTED_OVER_FILE).exists()


def test_after_a_refused_start_the_checkpoints_are_what_counts(run: Run) -> None:
    """The job found none; since then they came back, or somebody wants to start over."""
    add_attempt(run, committed=8)
    add_attempt(run, committed=None, code=EXIT_NO_CHECKPOINT, cause="no_checkpoint")
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        plan_resume("tiny-1")
    assert plan_resume("tiny-1", from_scratch=True).chosen is None
    back = add_checkpoint(run, 8)
    assert plan_resume("tiny-1").chosen == back
    assert list_checkpoints(run.checkpoints) == [back]


def test_the_plan_names_the_checkpoint_that_the_job_will_choose(run: Run) -> None:
    """Its bytes are what was committed; only their meaning is wrong, which the job looks at."""
    older, newer = add_checkpoint(run, 4), add_checkpoint(run, 8, finite=False)
    plan = plan_resume("tiny-1")
    assert plan.chosen == older
    assert plan.verdicts[0].reason == "adapter_model.safetensors: a is not finite"
    assert choose_start(run, world_size=1).checkpoint == older
    assert not newer.exists()


def test_after_the_gpu_ran_out_of_memory_the_hint_is_a_command_that_goes_on(run: Run) -> None:
    """Whatever the estimate said before: its advice takes a tenth off, and keeps to what a checkpoint goes with."""
    run.spec_path.write_text(f"{run.spec_path.read_text().rstrip()[:-1]}, per_device_train_batch_size: 8}}\n")
    add_attempt(run, committed=None, cause="gpu_memory")
    with pytest.raises(RunError, match="would end the same way again: the GPU ran out of memory") as raised:
        plan_resume("tiny-1")
    command, _, peaks = str(raised.value.hint).partition(" (")
    words = command.split()
    assert words[:3] == ["lora-jobs", "resume", "tiny-1"]
    options = list(zip(words[3::2], words[4::2], strict=True))
    plan = plan_resume(
        "tiny-1",
        [value for name, value in options if name == "--set"],
        allow_drift=[value for name, value in options if name == "--allow-drift"],
    )
    assert plan.report is not None
    now = plan.report.verdict.estimate.peak_bytes
    assert peaks.startswith(f"{format_gib(now)} instead of ")
    before = plan_resume("tiny-1", force=True).report
    assert before is not None
    assert now <= LOWER * before.verdict.estimate.peak_bytes
