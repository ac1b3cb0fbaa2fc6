"""MANIFEST.json: what is written, and what is refused when it is read."""

from __future__ import annotations

import json
import os
import shutil
import time
from typing import TYPE_CHECKING, Any

import pytest
import xxhash
from msgspec.structs import replace

from lora_jobs.checkpoints import (
    MANIFEST,
    AdapterDigest,
    FileEntry,
    Manifest,
    adopt_checkpoint,
    commit_checkpoint,
    load_manifest,
    verify_checkpoint,
    verify_foreign,
)
from lora_jobs.checkpoints.commit import find_writer, flush_part, wait_until_visible, write_manifest
from lora_jobs.checkpoints.manifest import MAX_MANIFEST_BYTES
from lora_jobs.errors import CheckpointError, RunError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Maker = Callable[..., Path]


def _rewrite(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Edit a manifest and put a digest that fits: only what is said may be wrong, not that it was changed."""
    path = directory / MANIFEST
    values = json.loads(path.read_text())
    del values["digest"]
    change(values)
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
    path.write_text(json.dumps({**values, "digest": xxhash.xxh3_128(canonical).hexdigest()}))


def test_a_manifest_says_everything_about_a_checkpoint(save: Maker) -> None:
    directory = save(16, world_size=2, deepspeed=True)
    before = time.time()
    metadata = {"versions": {"torch": "2.13.0"}, "attempt": 3, "metric": float("nan"), "ranks": (0, 1)}
    manifest = commit_checkpoint(directory, step=16, world_size=2, metadata=metadata)
    files = {
        str(path.relative_to(directory)): FileEntry(
            path.stat().st_size, xxhash.xxh3_128(path.read_bytes()).hexdigest(), rank=int("rank_1_" in path.name)
        )
        for path in directory.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }
    files["rng_state_1.pth"] = replace(files["rng_state_1.pth"], rank=1)
    assert len(files) == 11
    adapter = b"a F32 [16]\n" + bytes(range(64)) + b"b F32 [32]\n" + b"\1" * 128
    assert manifest == Manifest(
        step=16,
        world_size=2,
        created_at=manifest.created_at,
        files=files,
        epoch=2.0,
        metadata={"versions": {"torch": "2.13.0"}, "attempt": 3, "metric": None, "ranks": [0, 1]},
        shards=(
            "global_step16/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
            "global_step16/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
            "rng_state_0.pth",
            "rng_state_1.pth",
        ),
        adapter=AdapterDigest(
            2,
            xxhash.xxh3_128(b"a F32 [16]\nb F32 [32]\n").hexdigest(),
            xxhash.xxh3_128(adapter).hexdigest(),
        ),
    )
    assert before <= manifest.created_at <= time.time()
    assert manifest.total_bytes == sum(entry.bytes for entry in files.values())
    assert load_manifest(directory) == manifest


def test_an_adapter_needs_no_training_state(tmp_path: Path, save: Maker) -> None:
    finished = save(8).rename(tmp_path / "adapter")
    for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (finished / name).unlink()
    manifest = commit_checkpoint(finished, step=8, world_size=1)
    assert sorted(manifest.files) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert (manifest.step, manifest.epoch) == (8, None)


def test_hidden_files_are_no_part_of_a_checkpoint(save: Maker) -> None:
    directory = save(8)
    (directory / ".nfs0001").write_text("left by the file system")
    assert ".nfs0001" not in commit_checkpoint(directory, step=8, world_size=1).files


def _remove(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).unlink()


def _cut(name: str) -> Callable[[Path], object]:
    return lambda directory: os.truncate(directory / name, (directory / name).stat().st_size // 2)


def _write(name: str, text: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(text)


INCOMPLETE = {
    "rank 1 lost its random state": (_remove("rng_state_1.pth"), "rng_state_1.pth is missing (2 ranks)"),
    "rank 1 lost its shard": (
        _remove("global_step8/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        "global_step8/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt is missing (2 ranks)",
    ),
    "no optimizer state": (
        lambda directory: shutil.rmtree(directory / "global_step8") or (directory / "latest").unlink(),
        "no optimizer state: neither optimizer.pt nor DeepSpeed's folder",
    ),
    "no scheduler": (_remove("scheduler.pt"), "scheduler.pt is missing"),
    "no random state at all": (
        lambda directory: [path.unlink() for path in directory.glob("rng_state_*")],
        "rng_state_0.pth is missing (2 ranks)",
    ),
    "no model states": (
        _remove("global_step8/mp_rank_00_model_states.pt"),
        "global_step8: the model states are missing",
    ),
    "a part of a third rank": (
        lambda directory: shutil.copy(directory / "rng_state_1.pth", directory / "rng_state_2.pth"),
        "rng_state_2.pth is of rank 2, and there are 2 ranks",
    ),
    "no latest": (_remove("latest"), "latest is missing: it names DeepSpeed's folder"),
    "empty latest": (_write("latest", ""), "latest names the folder '', which is not there"),
    "latest of another step": (_write("latest", "global_step7"), "latest names the folder 'global_step7', which is"),
    "no trainer state": (_remove("trainer_state.json"), "trainer_state.json is missing"),
    "trainer state of another step": (
        _write("trainer_state.json", '{"global_step": 7}'),
        "trainer_state.json is of step 7, the checkpoint of step 8",
    ),
    "trainer state is a list": (_write("trainer_state.json", "[]"), "trainer_state.json is of step None"),
    "trainer state cut short": (_cut("trainer_state.json"), "trainer_state.json is not JSON"),
    "adapter cut short": (_cut("adapter_model.safetensors"), "adapter_model.safetensors is "),
    "shard cut short by a full disk": (
        _cut("global_step8/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt is not a whole torch file",
    ),
    "empty random state": (_write("rng_state_0.pth", ""), "rng_state_0.pth is not a whole torch file"),
    "a link": (lambda directory: (directory / "more").symlink_to("/etc"), "more is a symbolic link"),
    "a pipe": (lambda directory: os.mkfifo(directory / "more"), "more is not a plain file"),
}


@pytest.mark.parametrize("name", INCOMPLETE)
def test_an_incomplete_save_is_not_committed(name: str, save: Maker) -> None:
    directory = save(8, world_size=2, deepspeed=True)
    damage, reason = INCOMPLETE[name]
    damage(directory)
    with pytest.raises(CheckpointError) as caught:
        commit_checkpoint(directory, step=8, world_size=2)
    assert reason in caught.value.message
    assert not (directory / MANIFEST).exists()


ZERO_3 = [f"global_step8/zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in (0, 1)]


def _make_zero_3(directory: Path) -> None:
    """Under ZeRO-3 every rank writes model states of its own."""
    for name in ZERO_3:
        shutil.copy(directory / "global_step8/mp_rank_00_model_states.pt", directory / name)
    (directory / "global_step8/mp_rank_00_model_states.pt").unlink()


def test_under_zero_3_the_model_states_of_every_rank_are_needed(save: Maker) -> None:
    directory = save(8, world_size=2, deepspeed=True)
    _make_zero_3(directory)
    (directory / ZERO_3[1]).rename(directory.parent / "kept")
    with pytest.raises(
        CheckpointError, match=r"global_step8/zero_pp_rank_1_mp_rank_00_model_states\.pt is missing \(2 ranks\)"
    ):
        commit_checkpoint(directory, step=8, world_size=2)
    (directory.parent / "kept").rename(directory / ZERO_3[1])
    assert set(ZERO_3) < set(commit_checkpoint(directory, step=8, world_size=2).shards)
    assert verify_checkpoint(directory).good


@pytest.mark.parametrize("name", ["rng_state.pth", "scheduler.pt", "optimizer.pt"])
def test_another_tools_checkpoint_without_its_training_state_is_not_taken(name: str, save: Maker) -> None:
    directory = save(8)
    assert verify_foreign(directory, level=1).good
    (directory / name).unlink()
    verdict = verify_foreign(directory, level=1)
    assert not verdict.good
    assert name in verdict.reason
    with pytest.raises(CheckpointError, match=name):
        adopt_checkpoint(directory)


def test_the_shards_of_a_manifest_are_those_that_its_ranks_write(commit: Maker) -> None:
    directory = commit(8, world_size=2, deepspeed=True)
    _rewrite(directory, lambda values: values["shards"].remove("rng_state_1.pth"))
    verdict = verify_checkpoint(directory, level=0)
    assert (verdict.good, verdict.reason) == (False, "the manifest's shards are not those of 2 ranks: rng_state_1.pth")


def test_an_empty_or_wrongly_named_folder_is_not_committed(tmp_path: Path, save: Maker) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(CheckpointError, match="the folder is empty"):
        commit_checkpoint(tmp_path / "checkpoint-3", step=3, world_size=1)
    with pytest.raises(CheckpointError, match="the folder is named checkpoint-8, its content is checkpoint-9"):
        commit_checkpoint(save(8), step=9, world_size=1)
    with pytest.raises(CheckpointError, match="No such file or directory"):
        commit_checkpoint(tmp_path / "checkpoint-4", step=4, world_size=1)


def test_a_manifest_of_the_first_schema_still_loads(commit: Maker) -> None:
    directory = commit(8)
    present = load_manifest(directory)

    def go_back(values: dict[str, Any]) -> None:
        values["schema"] = 1
        del values["shards"], values["adapter"]
        for entry in values["files"].values():
            del entry["rank"]

    _rewrite(directory, go_back)
    assert load_manifest(directory) == replace(present, shards=None, adapter=None)
    assert verify_checkpoint(directory).good


@pytest.mark.parametrize(
    ("name", "world_size", "rank"),
    [
        ("rng_state.pth", 1, 0),
        ("rng_state_1.pth", 2, 1),
        ("rng_state_1.pth", 1, 0),
        ("global_step8/bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt", 4, 3),
        ("global_step8/zero_pp_rank_2_mp_rank_00_model_states.pt", 4, 2),
        ("global_step8/mp_rank_00_model_states.pt", 4, 0),
        ("adapter_model.safetensors", 4, 0),
    ],
)
def test_the_name_of_a_file_tells_which_rank_wrote_it(name: str, world_size: int, rank: int) -> None:
    assert find_writer(name, world_size) == rank


def test_each_rank_answers_for_its_own_files_only(save: Maker) -> None:
    directory = save(8, world_size=2, deepspeed=True)
    parts = [flush_part(directory, rank=rank, world_size=2) for rank in (0, 1)]
    assert sorted(parts[1]) == ["global_step8/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", "rng_state_1.pth"]
    assert not parts[0].keys() & parts[1].keys()
    with pytest.raises(CheckpointError, match=r"rng_state_1\.pth is missing \(2 ranks\)"):
        write_manifest(directory, parts[0], step=8, world_size=2)
    assert write_manifest(directory, parts[0] | parts[1], step=8, world_size=2) == load_manifest(directory)


def test_a_file_that_rank_0_does_not_see_is_not_committed(save: Maker) -> None:
    directory = save(8, world_size=2)
    files = flush_part(directory, rank=0, world_size=2) | flush_part(directory, rank=1, world_size=2)
    (directory / "rng_state_1.pth").unlink()
    with pytest.raises(CheckpointError, match=r"rng_state_1\.pth of rank 1 \(\d+ bytes\) is not seen by rank 0"):
        wait_until_visible(directory, files, timeout_seconds=0.0)


FOREIGN = {
    "empty": (b"", "is not a manifest: Expecting value"),
    "not JSON": (b"{", "is not a manifest: Expecting property name"),
    "not text": (b"\xff\xfe\x00", "is not a manifest"),
    "a list": (b"[]", "kind is not 'lora-jobs checkpoint'"),
    "of another program": (b'{"kind": "backup"}', "kind is not 'lora-jobs checkpoint'"),
    "deeply nested": (b"[" * 200_000, "is not a manifest"),
    "with NaN": (b'{"kind": NaN}', "NaN is not a number"),
    "too large": (b" " * (MAX_MANIFEST_BYTES + 1), "is larger than"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_manifest_is_refused_in_words(name: str, commit: Maker) -> None:
    content, reason = FOREIGN[name]
    directory = commit(8)
    (directory / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_manifest(directory)
    assert reason in caught.value.message
    assert caught.value.path == directory


HASH = "0" * 32
WRONG_VALUES = {
    "schema": (lambda values: values.update(schema=3), "schema 3 is not known here (wanted 2)"),
    "schema is true": (lambda values: values.update(schema=True), "schema True is not known here"),
    "shards is a number": (lambda values: values.update(shards=1), "shards is 1"),
    "shard that is no file": (lambda values: values.update(shards=["x"]), "shards names what is not among the files"),
    "adapter is a number": (lambda values: values.update(adapter=1), "adapter is 1"),
    "adapter without a hash": (lambda values: values["adapter"].pop("content"), "the hash of adapter content is None"),
    "rank below zero": (lambda values: values["files"]["README.md"].update(rank=-1), "rank is -1"),
    "hash": (lambda values: values.update(hash="md5"), "hash 'md5' is not known here (wanted xxh3_128)"),
    "step is true": (lambda values: values.update(step=True), "step is True"),
    "step is below zero": (lambda values: values.update(step=-1), "step is -1"),
    "no step": (lambda values: values.pop("step"), "step is None"),
    "world size is text": (lambda values: values.update(world_size="2"), "world_size is '2'"),
    "epoch is text": (lambda values: values.update(epoch="1"), "epoch is '1'"),
    "no time": (lambda values: values.update(created_at=None), "created_at is None"),
    "files is a list": (lambda values: values.update(files=[]), "files is []"),
    "metadata is a list": (lambda values: values.update(metadata=[]), "metadata is []"),
    "entry is a number": (lambda values: values["files"].update(x=3), "x has no size and hash"),
    "size below zero": (lambda values: values["files"].update(x={"bytes": -1, "hash": HASH}), "bytes is -1"),
    "no hash": (lambda values: values["files"].update(x={"bytes": 1}), "the hash of x is None"),
    "short hash": (lambda values: values["files"].update(x={"bytes": 1, "hash": "00"}), "the hash of x is '00'"),
    "odd hash": (lambda values: values["files"].update(x={"bytes": 1, "hash": "g" * 32}), "the hash of x is 'ggg"),
}


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_every_value_of_a_manifest_is_checked(name: str, commit: Maker) -> None:
    change, reason = WRONG_VALUES[name]
    directory = commit(8)
    _rewrite(directory, change)
    with pytest.raises(CheckpointError) as caught:
        load_manifest(directory)
    assert reason in caught.value.message


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../checkpoint-4/x", "a/../../x", "..", ".", "", "a//b", "./a", "a/", "MANIFEST.json", "a\0b"],
)
def test_a_path_that_leaves_the_checkpoint_is_refused(path: str, commit: Maker) -> None:
    directory = commit(8)
    _rewrite(directory, lambda values: values["files"].update({path: {"bytes": 1, "hash": HASH}}))
    with pytest.raises(CheckpointError, match="is not a path inside the checkpoint"):
        load_manifest(directory)


def test_an_edit_shows(commit: Maker) -> None:
    directory = commit(8)
    path = directory / MANIFEST
    path.write_text(path.read_text().replace('"job_id": "7"', '"job_id": "8"'))
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json was changed after it was written"):
        load_manifest(directory)


def test_a_manifest_that_is_no_plain_file_is_refused(tmp_path: Path, commit: Maker) -> None:
    linked, piped, folder = commit(8), commit(9), commit(10)
    (linked / MANIFEST).rename(tmp_path / "elsewhere")
    (linked / MANIFEST).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="can't be read: Too many levels of symbolic links"):
        load_manifest(linked)
    (piped / MANIFEST).unlink()
    os.mkfifo(piped / MANIFEST)
    with pytest.raises(CheckpointError, match="is not a plain file"):
        load_manifest(piped)
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).mkdir()
    with pytest.raises(CheckpointError, match="is not a plain file"):
        load_manifest(folder)


def test_a_manifest_that_cannot_be_written_is_an_error_and_leaves_no_checkpoint(save: Maker) -> None:
    directory = save(8)
    (directory / MANIFEST).mkdir()
    with pytest.raises(RunError, match="cannot write"):
        commit_checkpoint(directory, step=8, world_size=1)
    assert [path.name for path in directory.iterdir() if path.name.startswith(".")] == []
