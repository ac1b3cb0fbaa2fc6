"""Begin and end of an attempt, as the batch script calls them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from small_checkpoints import write_checkpoint

from lora_jobs.checkpoints import MANIFEST, commit_checkpoint, list_checkpoints
from lora_jobs.errors import RunError
from lora_jobs.runs import (
    EXIT_NO_CHECKPOINT,
    EXIT_NO_PROGRESS,
    EXIT_SAVED,
    STARTED_OVER_FILE,
    Attempt,
    Run,
    Submission,
    append_metrics,
    append_submission,
    create_run,
    list_committed_steps,
    load_attempts,
    load_lease,
    render_started_over,
)
from lora_jobs.spec import load_spec
from lora_jobs.training.attempt import NoGoodCheckpointError, begin, choose_start, end, main, wait_for_attempt
from lora_jobs.training.launch import Launch
from lora_jobs.training.tenure import hold_training

if TYPE_CHECKING:
    from pathlib import Path

SPEC = """
name: tiny
model: {name_or_path: models/tiny_gemma2}
lora: {r: 4}
data: {train: data.jsonl}
training: {max_steps: 10}
resources: {gpus_per_node: 2}
"""
LOCAL = Launch("local", "no-process", 0, 0, 0, 2, "here", started_after=0.0)
EARLY = "before training began: nothing was to be saved"
SLURM = Launch("slurm", "4711", 0, 0, 0, 2, "lrdn0001")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return create_run(tmp_path, "tiny-1", {"spec.yaml": SPEC})


def add_checkpoint(run: Run, step: int, *, world_size: int = 2, commit: bool = True) -> Path:
    directory = run.checkpoints / f"checkpoint-{step}"
    write_checkpoint(directory, step=step, world_size=world_size)
    (directory / "notes.txt").write_text("weights")
    if commit:
        commit_checkpoint(directory, step=step, world_size=world_size, metadata={})
    return directory


def summarize(attempt: Attempt) -> dict[str, Any]:
    names = ("number", "job_id", "restart_count", "backend", "state", "resume_from", "first_step")
    return {name: getattr(attempt, name) for name in names}


def test_the_first_attempt_starts_from_the_base_model(run: Run) -> None:
    attempt, explanation = begin(run, SLURM)
    assert explanation == ("starting from the base model",)
    assert summarize(attempt) == {
        "number": 1,
        "job_id": "4711",
        "restart_count": 0,
        "backend": "slurm",
        "state": "RUNNING",
        "resume_from": None,
        "first_step": 0,
    }
    assert attempt.world_size == load_spec(run.spec_path).resources.world_size


def test_begin_twice_is_the_same_attempt_and_a_requeue_is_the_next(run: Run) -> None:
    first, _ = begin(run, SLURM)
    assert begin(run, SLURM) == (first, ())
    requeued = Launch("slurm", "4711", 1, 0, 0, 2, "lrdn0002")
    assert begin(run, requeued)[0].number == 2


def test_the_newest_good_checkpoint_is_chosen_and_each_verdict_is_told(run: Run) -> None:
    add_checkpoint(run, 4)
    broken = add_checkpoint(run, 8)
    (broken / "notes.txt").write_text("weightz")
    unfinished = add_checkpoint(run, 12, commit=False)
    attempt, explanation = begin(run, SLURM)
    assert (attempt.resume_from, attempt.first_step) == ("checkpoint-4", 4)
    assert [line.split(": ")[0] for line in explanation[:3]] == [unfinished.name, broken.name, "checkpoint-4"]
    aside = "checkpoint-8.set-aside-1"
    assert explanation[2:] == ("checkpoint-4: good", f"moved aside as {aside}", "resuming from checkpoint-4")
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [
        "checkpoint-12",
        "checkpoint-4",
        aside,
        f"{aside}.json",
    ]


def test_what_others_can_write_is_not_resumed_from(run: Run) -> None:
    open_to_all = add_checkpoint(run, 8)
    add_checkpoint(run, 4)
    (open_to_all / "notes.txt").chmod(0o666)
    start = choose_start(run, world_size=2)
    assert start.step == 4
    assert f"{open_to_all}/notes.txt can be written by everyone (mode 0666)" in start.explanation[0]
    run.checkpoints.chmod(0o777)
    with pytest.raises(RunError, match=r"checkpoints can be written by everyone \(mode 0777\): what is in it is not"):
        choose_start(run, world_size=2)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", ["", "checkpoints"])
def test_a_run_of_another_user_is_not_resumed(run: Run, name: str) -> None:
    add_checkpoint(run, 4)
    os.chown(run.directory / name, 65534, 65534)
    with pytest.raises(RunError, match=r"belongs to another user \(uid 65534\)"):
        choose_start(run, world_size=2)


def test_an_unfinished_save_alone_means_starting_over(run: Run) -> None:
    add_checkpoint(run, 4, commit=False)
    assert choose_start(run, world_size=2).checkpoint is None


def lose(run: Run, what: str) -> None:
    """What a purge of the scratch disk, or a careless copy, leaves of the checkpoints."""
    for directory in list_checkpoints(run.checkpoints):
        if what == "folders":
            shutil.rmtree(directory)
        else:
            (directory / MANIFEST).unlink()


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("folders", "checkpoint-8: it was committed, and is gone"),
        ("manifests", "checkpoint-8: it was committed, and has lost its MANIFEST.json; checkpoint-4: "),
    ],
)
@pytest.mark.parametrize("ended", [True, False], ids=["the attempt ended", "the attempt was killed"])
def test_work_that_was_committed_and_is_gone_is_not_trained_again_in_silence(
    run: Run, what: str, reason: str, ended: bool
) -> None:
    attempt, _ = begin(run, SLURM)
    for step in (4, 8):
        add_checkpoint(run, step)
        append_metrics(run, {"kind": "note", "event": "committed", "attempt": 1, "step": step})
    if ended:
        end(run, attempt, EXIT_SAVED)
    lose(run, what)
    later = Launch("slurm", "4711", 1, 0, 0, 2, "lrdn0001")
    with pytest.raises(NoGoodCheckpointError, match=r"no good checkpoint in .*: checkpoint-8: ") as raised:
        begin(run, later)
    assert reason in raised.value.message
    assert "resume tiny-1 --from-scratch starts over" in str(raised.value.hint)
    (_, last) = load_attempts(run)
    assert (last.exit_code, last.cause) == (EXIT_NO_CHECKPOINT, "no_checkpoint")
    assert len(list_checkpoints(run.checkpoints)) == (0 if what == "folders" else 2)
    (run.directory / STARTED_OVER_FILE).write_text(render_started_over(run))
    append_submission(run, Submission("4712", "slurm", 0.0, "here", after_attempt=2))
    assert begin(run, Launch("slurm", "4712", 0, 0, 0, 2, "lrdn0001"))[0].first_step == 0


def test_a_newer_one_that_lost_its_manifest_is_moved_aside_and_an_unfinished_one_is_not(run: Run) -> None:
    """Training passes its step again, and clears an unfinished save out of the way."""
    attempt, _ = begin(run, SLURM)
    for step in (4, 8):
        add_checkpoint(run, step)
    end(run, attempt, EXIT_SAVED)
    (run.checkpoints / "checkpoint-8" / MANIFEST).unlink()
    add_checkpoint(run, 12, commit=False)
    later = Launch("slurm", "4711", 1, 0, 0, 2, "lrdn0001")
    attempt, explanation = begin(run, later)
    assert attempt.first_step == 4
    assert "moved aside as checkpoint-8.set-aside-1" in explanation
    record = json.loads((run.checkpoints / "checkpoint-8.set-aside-1.json").read_text())
    assert record["reason"] == "it was committed, and has lost its MANIFEST.json"
    assert (run.checkpoints / "checkpoint-8.set-aside-1" / "notes.txt").exists()
    assert (run.checkpoints / "checkpoint-12").is_dir()
    # What is saved at step 8 now, and not finished, is another save.
    add_checkpoint(run, 8, commit=False)
    assert list_committed_steps(run) == {4}
    begin(run, Launch("slurm", "4711", 2, 0, 0, 2, "lrdn0001"))
    assert (run.checkpoints / "checkpoint-8").is_dir()


def test_when_all_that_was_committed_is_broken_the_attempt_fails_at_once(run: Run) -> None:
    (add_checkpoint(run, 4) / "notes.txt").unlink()
    with pytest.raises(NoGoodCheckpointError, match=r"no good checkpoint in .*: checkpoint-4: "):
        begin(run, SLURM)
    (attempt,) = load_attempts(run)
    assert (attempt.state, attempt.exit_code, attempt.resume_from) == ("FAILED", EXIT_NO_CHECKPOINT, None)
    with pytest.raises(RunError, match="rank 0 could not begin attempt 1: no good checkpoint"):
        wait_for_attempt(run, SLURM)


def test_a_checkpoint_of_another_number_of_processes_is_refused(run: Run) -> None:
    add_checkpoint(run, 4, world_size=4)
    with pytest.raises(RunError, match="checkpoint-4 was saved by 4 processes, this job has 2"):
        begin(run, SLURM)


def test_a_local_job_that_got_an_old_process_id_again_is_a_new_attempt(run: Run) -> None:
    first, _ = begin(run, LOCAL)
    later = Launch("local", LOCAL.job_id, 0, 0, 0, 2, "here", started_after=first.started_at + 1)
    second = begin(run, later)[0]
    assert (second.number, second.restart_count) == (2, 1)


@pytest.mark.parametrize(
    ("code", "note", "state", "final", "reason", "decision"),
    [
        (0, None, "COMPLETED", 0, "finished", "done"),
        (EXIT_SAVED, None, "SAVED", EXIT_SAVED, "saved on a signal", "requeue"),
        (137, {"event": "saved", "signal": "SIGTERM"}, "SAVED", EXIT_SAVED, "saved after SIGTERM", "requeue"),
        (1, {"event": "failed", "reason": "no GPU"}, "FAILED", 1, "no GPU", "stop"),
        (1, {"event": "lost_rank", "reason": "another rank is gone"}, "FAILED", 1, "another rank is gone", "requeue"),
        (137, None, "FAILED", 137, "ended by signal 9", "stop"),
        (3, None, "FAILED", 3, "exit code 3", "stop"),
        (143, None, "SAVED", EXIT_SAVED, f"ended by signal 15 {EARLY}", "requeue"),
        (140, None, "SAVED", EXIT_SAVED, f"ended by signal 12 {EARLY}", "requeue"),
        (143, {"event": "start"}, "FAILED", 143, "ended by signal 15", "stop"),
    ],
)
def test_the_end_is_written_with_its_reason_and_decided(
    run: Run, code: int, note: dict[str, str] | None, state: str, final: int, reason: str, decision: str
) -> None:
    attempt, _ = begin(run, SLURM)
    add_checkpoint(run, 6)
    append_metrics(run, {"kind": "note", "attempt": 7, "event": "failed", "reason": "another attempt's"})
    if note is not None:
        append_metrics(run, {"kind": "note", "attempt": 1, **note})
    assert end(run, attempt, code) == decision
    (ended,) = load_attempts(run)
    assert (ended.state, ended.exit_code, ended.reason, ended.last_committed_step) == (state, final, reason, 6)


def test_the_commands_print_what_the_batch_script_reads(run: Run) -> None:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SUBMITIT_"))},
        "SLURM_JOB_ID": "99",
    }

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lora_jobs.training.attempt", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    begun = call("begin", str(run.directory))
    assert (begun.returncode, begun.stdout, begun.stderr) == (0, "1\n", "starting from the base model\n")
    ended = call("end", str(run.directory), "85")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "requeue\n", "")


def test_a_run_that_cannot_begin_exits_with_its_own_code(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    (add_checkpoint(run, 4) / "notes.txt").unlink()
    assert main(["begin", str(run.directory)]) == EXIT_NO_CHECKPOINT
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lora-jobs: no good checkpoint in ")
    assert "\nnext: " in err


def test_wrong_usage_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["begin"]) == 2
    assert capsys.readouterr().err.startswith("usage: ")


def test_a_stop_within_a_step_says_what_is_repeated(run: Run) -> None:
    attempt, _ = begin(run, SLURM)
    note = {"kind": "note", "event": "saved", "attempt": 1, "step": 0, "signal": "SIGUSR2", "unfinished_step": 1}
    append_metrics(run, note)
    assert end(run, attempt, EXIT_SAVED) == "requeue"
    assert load_attempts(run)[0].reason == "saved after SIGUSR2 (step 1 was unfinished and will be repeated)"


def test_two_starts_that_commit_nothing_are_the_last_until_somebody_resumes(run: Run) -> None:
    """Killed twice without a word: Slurm itself would start the job for ever."""
    for restart in range(2):
        begin(run, Launch("slurm", "4711", restart, 0, 0, 2, "lrdn0001"))
    with pytest.raises(RunError, match="two attempts in a row committed no new step: the newest is still step 0"):
        begin(run, Launch("slurm", "4711", 2, 0, 0, 2, "lrdn0001"))
    last = load_attempts(run)[-1]
    assert (last.number, last.state, last.exit_code, last.cause) == (3, "FAILED", EXIT_NO_PROGRESS, "no_progress")
    append_submission(run, Submission("4712", "slurm", 0.0, "here", after_attempt=3))
    assert begin(run, Launch("slurm", "4712", 0, 0, 0, 2, "lrdn0001"))[0].number == 4


def test_a_start_that_committed_something_is_no_reason_to_stop(run: Run) -> None:
    begin(run, SLURM)
    add_checkpoint(run, 4)
    for restart in (1, 2):
        begin(run, Launch("slurm", "4711", restart, 0, 0, 2, "lrdn0001"))
    assert len(load_attempts(run)) == 3


def test_what_another_job_committed_while_the_lease_was_waited_for_is_not_trained_past(run: Run) -> None:
    """The choice is older than it: the next start chooses it, and comes by itself."""
    add_checkpoint(run, 4)
    attempt, _ = begin(run, SLURM)
    with hold_training(run, attempt, SLURM, hang_seconds=60.0):
        assert load_lease(run) is not None
    add_checkpoint(run, 8)
    reason = "checkpoint-8 was committed by another job after this one had chosen checkpoint-4"
    with pytest.raises(RunError, match=reason), hold_training(run, attempt, SLURM, hang_seconds=60.0):
        pytest.fail("trained from a stale choice")
    assert load_lease(run) is None
    append_metrics(run, {"kind": "note", "attempt": 1, "event": "failed", "reason": reason})
    assert end(run, attempt, 5) == "requeue"
    assert load_attempts(run)[0].cause == "stale_choice"
    again, _ = begin(run, Launch("slurm", "4711", 1, 0, 0, 2, "lrdn0001"))
    assert again.resume_from == "checkpoint-8"


def test_a_broken_gpu_names_its_node(run: Run) -> None:
    attempt, _ = begin(run, SLURM)
    reason = "RuntimeError: CUDA error: uncorrectable ECC error encountered"
    note = {"kind": "note", "attempt": 1, "event": "failed", "reason": reason, "host": "lrdn0002"}
    append_metrics(run, note)
    assert end(run, attempt, 1) == "requeue lrdn0002"
    (ended,) = load_attempts(run)
    assert (ended.cause, ended.bad_node) == ("gpu_broken", "lrdn0002")


def test_where_slurm_does_not_requeue_the_record_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_JOBS_CAN_REQUEUE", "no")
    attempt, _ = begin(run, SLURM)
    assert end(run, attempt, EXIT_SAVED) == "stop"
    assert load_attempts(run)[0].reason == "saved on a signal; not requeued: Slurm does not requeue this job"
