"""What ends a run outside its ranks: its launcher killed, no step gained in two starts, two starts at once."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
from fault_ranks import KINDS, fault, wait_or_end, wait_until_stopped
from interruptions import interrupt
from test_local_runs import EVERY, Shell, kill_everything, wait_for_end
from tiny_runs import RankServer, create_tiny_run, hash_adapter, read_logs, wait_for_step

from lora_jobs.checkpoints import choose_checkpoint, load_manifest
from lora_jobs.cluster.local import find_local_processes
from lora_jobs.runs import EXIT_NO_PROGRESS, load_attempts, load_metrics, load_submissions
from lora_jobs.spec import load_spec

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.train

LONG = os.environ.get("LORA_JOBS_FAULTS") == "long"
STEPS = 100


@pytest.mark.skipif(not LONG, reason="part of the long form: make faults")
def test_kill_9_of_the_launcher(tiny: Path, tmp_path: Path, record: Callable[..., None]) -> None:
    """Its ranks train on without it; until they have ended nothing else trains the run."""
    whole = Shell(tiny, tmp_path / "whole").submit("--wait")
    shell = Shell(tiny, tmp_path / "runs")
    run = shell.submit()
    wait_for_step(run, EVERY + 1, commits=EVERY)
    os.kill(int(load_submissions(run)[0].job_id), signal.SIGKILL)
    while_alive = shell.run("resume", run.id)
    left = find_local_processes(run)
    wait_for_end(run)
    again = shell.run("resume", run.id, "--wait")
    same = run.adapter.is_dir() and hash_adapter(run) == hash_adapter(whole)
    detail = f"resume meanwhile: exit {while_alive.returncode}; after it: exit {again.returncode}"
    record("stop", "kill -9 of the launcher", ours="same result" if same else "other result", ours_detail=detail)
    assert not left or while_alive.returncode == 5, while_alive.stdout + while_alive.stderr
    assert again.returncode == 0, again.stderr + read_logs(run)
    assert same


def test_two_starts_without_a_new_step_are_the_last(
    server: RankServer, tiny: Path, tmp_path: Path, record: Callable[..., None]
) -> None:
    """Killed twice in the step after the same checkpoint: the third start explains, and trains nothing."""
    sections, ranks = KINDS["plain"]
    run = create_tiny_run(tmp_path, "stuck-1", tiny, **sections)
    for _ in range(3):
        ended = interrupt(server, run, ranks, faults={0: [fault("on_step_end", 3)]}, by_hand=False)
        assert ended.codes == [-signal.SIGKILL]
    codes, hung = wait_or_end(server.start(run, ranks))
    refused = load_attempts(run)[-1]
    record("stop", "two starts without a new step", hung=hung, ours_detail=refused.reason,
           ours="stopped and explained" if codes == [EXIT_NO_PROGRESS] else "started again")  # fmt: skip
    assert codes == [EXIT_NO_PROGRESS], read_logs(run)
    assert "two attempts in a row committed no new step" in str(refused.reason)


@pytest.mark.skipif(not LONG, reason="part of the long form: make faults")
def test_two_starts_at_once(
    server: RankServer, tiny: Path, tmp_path: Path, uninterrupted: Callable[..., str], record: Callable[..., None]
) -> None:
    """The second finds the first one's lease and leaves; the first one ends as if alone."""
    sections, ranks = KINDS["zero2"]
    run = create_tiny_run(tmp_path, "shared-1", tiny, **sections)
    first = server.start(run, ranks, {rank: [fault("on_step_end", 3, "SIGSTOP")] for rank in (0, 1)})
    for pid in first.pids:
        wait_until_stopped(pid)
    second, _ = wait_or_end(server.start(run, ranks))  # its other rank is the launcher's to end
    first.kill(signal.SIGCONT)
    codes, hung = wait_or_end(first)
    same = codes == [0, 0] and hash_adapter(run) == uninterrupted(sections, ranks)
    record("stop", "two starts at once", hung=hung, ours_detail=f"the second: exit codes {second}",
           ours="one refused, same result" if same else "other result")  # fmt: skip
    assert 5 in second
    assert same, read_logs(run)


@pytest.mark.skipif(not LONG, reason="part of the long form: make faults")
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_killed_run_goes_on_with_another_number_of_processes(
    before: int, after: int, tiny: Path, tmp_path: Path, record: Callable[..., None]
) -> None:
    """`resume --gpus N` as a user types it: converted, the global batch kept, and the next commit is of N processes."""
    shell = Shell(tiny, tmp_path / "runs")
    sizes = {"lora.lora_dropout": 0, "resources.gpus_per_node": before, "training.gradient_accumulation_steps": after}
    sizes["training.max_steps"] = STEPS
    sets = [word for key, value in sizes.items() for word in ("--set", f"{key}={value}")]
    run = shell.submit(*sets)
    wait_for_step(run, EVERY + 1, commits=EVERY)
    kill_everything(run)
    assert not run.adapter.exists(), "killed too late to show anything"
    plain = shell.run("resume", run.id, "--set", f"resources.gpus_per_node={after}")
    done = shell.run("resume", run.id, "--gpus", f"{after}", "--wait")
    assert (plain.returncode, "another number of processes" in plain.stderr) == (5, True), plain.stderr
    assert done.returncode == 0, done.stderr + read_logs(run)
    choice = choose_checkpoint(run.checkpoints, level=3)
    assert choice.chosen is not None, choice.verdicts
    manifest, spec = load_manifest(choice.chosen), load_spec(run.spec_path)
    again = load_attempts(run)[1].first_step + 1
    rows = [row for row in load_metrics(run) if row["kind"] == "train" and row["step"] == again]
    record("stop", f"kill -9 of {before} process(es), then resume --gpus {after}", ours="converted, trained to the end")
    assert f"to {after} process(es)" in read_logs(run)
    assert (manifest.step, manifest.world_size) == (STEPS, after)
    assert (spec.resources.world_size, spec.training.gradient_accumulation_steps) == (after, before)
    assert len(rows) == 2, "the step after the checkpoint was trained by both"
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=0.01)
