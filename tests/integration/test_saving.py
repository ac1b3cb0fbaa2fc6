"""A save by all ranks or by none: one rank's trouble is told by all, nobody waits for ever, half is never committed."""

from __future__ import annotations

import resource
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from tiny_runs import RankServer, read_logs

from lora_jobs.checkpoints import list_checkpoints, load_manifest, verify_checkpoint
from lora_jobs.runs import EXIT_DISK_FULL, Run, load_attempts, load_metrics
from lora_jobs.training.attempt import begin
from lora_jobs.training.launch import Launch

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.train

TWO: dict[str, Any] = {
    "deepspeed": {"zero_stage": 2},
    "training": {"max_steps": 6, "save_steps": 2},
    "resources": {"gpus_per_node": 2},
}


def list_notes(run: Run, event: str) -> list[dict[str, Any]]:
    return [row for row in load_metrics(run) if row.get("event") == event]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_can_write_no_more_stops_the_run_for_want_of_room(
    rank: int, ranks: RankServer, make_run: Callable[..., Run]
) -> None:
    """One rank's files may not pass 4 KiB: its DeepSpeed shard fails, while the other rank waits in a barrier."""
    run = make_run("full-1", **TWO)
    run.logs.mkdir(exist_ok=True)
    job = ranks.start(run, 2)
    resource.prlimit(job.pids[rank], resource.RLIMIT_FSIZE, (LIMIT_BYTES, LIMIT_BYTES))
    assert job.wait() == [EXIT_DISK_FULL] * 2, read_logs(run)

    assert list_checkpoints(run.checkpoints) == []
    notes = list_notes(run, "save_failed")
    assert [(note["step"], note["rank"]) for note in notes] == [(2, rank), (4, rank)]
    (attempt,) = load_attempts(run)
    assert (attempt.state, attempt.exit_code) == ("FAILED", EXIT_DISK_FULL)
    assert (attempt.reason or "").startswith(f"checkpoint 4 could not be saved: no room: rank {rank}: ")


LIMIT_BYTES = 4096


def test_one_missed_save_does_not_stop_the_run(ranks: RankServer, make_run: Callable[..., Run]) -> None:
    """A link where the first checkpoint goes: nothing is written through it, and the run goes on to the next save."""
    run = make_run("missed-1", **TWO)
    elsewhere = run.directory / "elsewhere"
    elsewhere.mkdir()
    (run.checkpoints / "checkpoint-2").symlink_to(elsewhere)
    assert ranks.start(run, 2).wait() == [0, 0], read_logs(run)

    assert list(elsewhere.iterdir()) == []
    (note,) = list_notes(run, "save_skipped")
    assert (note["step"], "a checkpoint is never saved through one" in note["reason"]) == (2, True)
    manifests = [load_manifest(run.checkpoints / f"checkpoint-{step}") for step in (4, 6)]
    assert [(manifest.step, manifest.world_size) for manifest in manifests] == [(4, 2), (6, 2)]
    assert verify_checkpoint(run.adapter).good


def test_an_adapter_that_cannot_be_put_in_its_place_is_told_by_every_rank(
    ranks: RankServer, make_run: Callable[..., Run]
) -> None:
    """A link where the adapter goes: only rank 0 looks there, and the other rank hears of it."""
    run = make_run("linked-1", **{**TWO, "training": {"max_steps": 1, "save_steps": 1}})
    run.adapter.symlink_to(run.directory)
    assert ranks.start(run, 2).wait() == [5, 5], read_logs(run)

    reason = f"the adapter could not be saved: rank 0: {run.adapter} is a link"
    assert [note["reason"][: len(reason)] for note in list_notes(run, "failed")] == [reason] * 2


def test_a_checkpoint_larger_than_the_disk_is_not_begun(ranks: RankServer, make_run: Callable[..., Run]) -> None:
    run = make_run("small-1", **TWO)
    run.estimate_path.write_text('{"checkpoint_bytes": 1000000000000000000}')
    assert ranks.start(run, 2).wait() == [EXIT_DISK_FULL] * 2, read_logs(run)
    assert [note["step"] for note in list_notes(run, "save_skipped")] == [2, 4]
    assert list_checkpoints(run.checkpoints) == []
    assert "bytes free, the next checkpoint needs 1,050,000,000,016,777,216" in (load_attempts(run)[0].reason or "")


def test_what_was_loaded_is_compared_with_what_was_committed(ranks: RankServer, make_run: Callable[..., Run]) -> None:
    """The adapter changes after it was verified and before it is loaded: nothing is trained on it."""
    run = make_run("swapped-1", training={"trainer": "transformers", "max_steps": 2, "save_steps": 2})
    assert ranks.start(run, 1).wait() == [0], read_logs(run)
    shutil.rmtree(run.adapter)
    attempt, _ = begin(run, Launch("slurm", "4711", 0, 0, 0, 1, "here"))
    assert attempt.resume_from == "checkpoint-2"
    weights = run.checkpoints / "checkpoint-2" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)

    assert ranks.start_slurm_task(run, "4711").wait() == [5]
    (note,) = list_notes(run, "failed")
    assert "checkpoint-2 is good, but what was loaded from it is not what it holds" in note["reason"]
    assert "rank 0: the adapter in the model differs" in note["reason"]
    assert not run.adapter.exists()


def test_an_optimizer_whose_state_was_not_loaded_is_noticed() -> None:
    """It would go on from moments of zero, and no count would say so."""
    import torch

    from lora_jobs.training.probe import compare_steps

    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    assert compare_steps(optimizer, 0) is None
    assert compare_steps(optimizer, 4) == "the optimizer holds no moments, wanted those of step 4"
    weight.grad = torch.ones(2)
    optimizer.step()
    assert compare_steps(optimizer, 1) is None
    assert compare_steps(optimizer, 4) == "the optimizer is at step 1, wanted 4"
    assert compare_steps(torch.optim.SGD([weight]), 4) is None
