"""Level 3: files that are whole, and whose hashes hold, but that contradict one another. On real checkpoints."""

from __future__ import annotations

import re
import shutil
import struct
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
from tiny_runs import RankServer, create_tiny_run, read_logs

from lora_jobs.checkpoints import (
    MANIFEST,
    adopt_checkpoint,
    choose_checkpoint,
    commit_checkpoint,
    list_checkpoints,
    load_manifest,
    verify_checkpoint,
    verify_foreign,
)
from lora_jobs.runs import Run, load_attempts
from lora_jobs.workflows.verifying import verify_path_or_run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Damage = Callable[[Path], object]

pytestmark = pytest.mark.train

STEPS = {"max_steps": 4, "save_steps": 2}
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({"training": {**STEPS, "trainer": "transformers"}}, 1),
    "zero2": (
        {
            "training": {**STEPS, "bf16": True},
            "deepspeed": {"zero_stage": 2},
            "lora": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
            "resources": {"gpus_per_node": 2},
        },
        2,
    ),
    "zero3": (
        {
            "training": {**STEPS, "bf16": True},
            "deepspeed": {"zero_stage": 3},
            "resources": {"gpus_per_node": 2},
        },
        2,
    ),
    "zero0": ({"training": {**STEPS, "bf16": True}, "deepspeed": {"zero_stage": 0}}, 1),
}
ADAPTER = "adapter_model.safetensors"
MODEL = "global_step4/mp_rank_00_model_states.pt"
SHARD = "global_step4/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
MODEL_3 = "global_step4/zero_pp_rank_1_mp_rank_00_model_states.pt"
NAN = struct.pack("<f", float("nan"))


@pytest.fixture(scope="module")
def trained(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> dict[str, Path]:
    """A real checkpoint of each kind, at step 4."""
    found = {}
    for kind, (sections, count) in KINDS.items():
        run = create_tiny_run(tmp_path_factory.mktemp(kind), f"{kind}-1", tiny, **sections)
        assert ranks.start(run, count).wait() == [0] * count, read_logs(run)
        found[kind] = run.checkpoints / "checkpoint-4"
    return found


def rewrite(path: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Change the entries of a torch file whose name ends so; the archive is whole again, checksums included."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    changed = {key: change(data) if key.endswith(name) else data for key, data in entries.items()}
    assert changed != entries
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for key, data in changed.items():
            archive.writestr(key, data)


def number(name: str, key: str, new: int) -> Damage:
    """Another small number after a key of a pickle: the key, its place in the memo, one byte."""
    pattern = re.compile(re.escape(key.encode()) + rb"(q.|r....)K.", re.DOTALL)
    return lambda directory: rewrite(
        directory / name,
        "data.pkl",
        lambda data: pattern.sub(lambda found: found[0][:-1] + bytes([new]), data, count=1),
    )


def adapter(change: Callable[[str, Any], Any]) -> Damage:
    def damage(directory: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(directory / ADAPTER)
        save_file({key: change(key, value.clone()) for key, value in tensors.items()}, directory / ADAPTER)

    return damage


def spoil(key: str, value: Any) -> Any:
    if key.endswith("layers.1.mlp.up_proj.lora_A.weight"):
        value.view(-1)[5] = float("nan")
    return value


def spoil_last(path: Path) -> None:
    """What was written last: of DeepSpeed without ZeRO, its fp32 copy of the weights."""
    with zipfile.ZipFile(path) as archive:
        numbers = [int(name.rpartition("/")[2]) for name in archive.namelist() if re.search(r"/data/\d+$", name)]
    rewrite(path, f"/data/{max(numbers)}", lambda data: NAN + data[4:])


DAMAGES: dict[str, tuple[str, Damage, str]] = {
    "adapter not finite": ("plain", adapter(spoil), "layers.1.mlp.up_proj.lora_A.weight is not finite"),
    "adapter untrained": (
        "plain",
        adapter(lambda key, value: value * (".lora_B." not in key)),
        "every lora_B is zero, as before the first step",
    ),
    "moments not finite": (
        "plain",
        lambda directory: rewrite(directory / "optimizer.pt", "data/1", lambda data: NAN + data[4:]),
        "optimizer.pt: state.0.exp_avg is not finite",
    ),
    "step of the optimizer": (
        "plain",
        lambda directory: rewrite(directory / "optimizer.pt", "data/0", lambda _: struct.pack("<f", 3.0)),
        "step of parameter 0 in optimizer.pt is 3, wanted 4",
    ),
    "step of the scheduler": ("plain", number("scheduler.pt", "last_epoch", 3), "last_epoch of scheduler.pt is 3"),
    "adapter of another run": (
        "zero2",
        adapter(lambda key, value: value * 2 if "up_proj" in key else value),
        "up_proj.lora_A.weight is not what DeepSpeed's module holds",
    ),
    "step of DeepSpeed": ("zero2", number(MODEL, "global_steps", 3), "global_steps of DeepSpeed is 3, wanted 4"),
    "step of DeepSpeed, ZeRO-3": (
        "zero3",
        number(MODEL_3, "global_steps", 3),
        "global_steps of DeepSpeed is 3, wanted 4",
    ),
    "world of DeepSpeed, ZeRO-3": (
        "zero3",
        number(MODEL_3, "dp_world_size", 4),
        "dp_world_size of DeepSpeed is 4, wanted 2",
    ),
    "step of the optimizer, ZeRO-3": (
        "zero3",
        lambda directory: rewrite(directory / SHARD, "data/0", lambda _: struct.pack("<f", 3.0)),
        "step of parameter 0 in the optimizer shard of rank 1 is 3, wanted 4",
    ),
    "moments not finite, ZeRO-3": (
        "zero3",
        lambda directory: rewrite(directory / SHARD, "data/1", lambda data: NAN + data[4:]),
        "the optimizer shard of rank 1: state.0.exp_avg is not finite",
    ),
    "step of DeepSpeed, no ZeRO": ("zero0", number(MODEL, "global_steps", 3), "global_steps of DeepSpeed is 3, wanted"),
    "master not finite, no ZeRO": (
        "zero0",
        lambda directory: spoil_last(directory / MODEL),
        "DeepSpeed's optimizer: fp32_",
    ),
    "no optimizer, no ZeRO": (
        "zero0",
        lambda directory: rewrite(
            directory / MODEL, "data.pkl", lambda data: re.sub(rb"\0optimizer(?=[qr])", b"\0optimizeR", data)
        ),
        "DeepSpeed's optimizer holds no state",
    ),
    "world of DeepSpeed": ("zero2", number(MODEL, "dp_world_size", 4), "dp_world_size of DeepSpeed is 4, wanted 2"),
}


def copy(checkpoint: Path, place: Path) -> Path:
    return shutil.copytree(checkpoint, place / checkpoint.name)


def commit_again(directory: Path, kind: str) -> None:
    """A manifest that fits the damaged files: only their meaning is wrong then."""
    (directory / MANIFEST).unlink(missing_ok=True)
    commit_checkpoint(directory, step=4, world_size=KINDS[kind][1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_checkpoint_is_good_at_every_level(kind: str, trained: dict[str, Path], tmp_path: Path) -> None:
    verdict = verify_checkpoint(trained[kind], level=3)
    assert verdict.good, verdict.reason
    assert verdict.reason.endswith("sizes, step, structure, hashes and meaning hold")
    foreign = copy(trained[kind], tmp_path)
    (foreign / MANIFEST).unlink()
    verdict = verify_foreign(foreign)
    assert verdict.good, verdict.reason
    assert verdict.reason.endswith("files without a manifest: structure and meaning hold, nobody knows the bytes")
    assert not verify_checkpoint(foreign, level=3).good


@pytest.mark.parametrize("kind", ["zero0", "zero3"])
def test_these_stages_go_on_to_the_same_checkpoint(
    kind: str, trained: dict[str, Path], ranks: RankServer, tmp_path: Path
) -> None:
    run = Run(tmp_path / "again-1")
    shutil.copytree(trained[kind].parents[1], run.directory)
    for path in (run.checkpoints / "checkpoint-4", run.adapter):
        shutil.rmtree(path)
    count = KINDS[kind][1]
    assert ranks.start(run, count).wait() == [0] * count, read_logs(run)
    assert load_attempts(run)[-1].resume_from == "checkpoint-2"
    assert load_manifest(run.checkpoints / "checkpoint-4").adapter == load_manifest(trained[kind]).adapter


def test_the_manifest_says_what_was_trained_and_who_wrote_what(trained: dict[str, Path]) -> None:
    newer, older = (load_manifest(path) for path in list_checkpoints(trained["zero2"].parent))
    assert (older.step, newer.step) == (2, 4)
    assert {name for name, entry in newer.files.items() if entry.rank == 1} == {
        "rng_state_1.pth",
        "global_step4/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
    }
    assert set(newer.files) & {"training_args.bin", "zero_to_fp32.py"} == set()
    assert {"latest", "scheduler.pt", "trainer_state.json", "adapter_model.safetensors"} <= set(newer.files)
    assert newer.metadata["batch"] == {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "global": 4,
    }
    assert (newer.metadata["attempt"], newer.metadata["threads"]) == (1, 1)
    assert newer.metadata["data"]["examples"] == 64
    for manifest in (older, newer):
        assert all(len(manifest.metadata["model"][key]) == 32 for key in ("config", "tokenizer"))
    assert older.adapter is not None
    assert newer.adapter is not None
    assert older.adapter.structure == newer.adapter.structure
    assert older.adapter.content != newer.adapter.content


@pytest.mark.parametrize("name", DAMAGES)
def test_a_contradiction_is_found_though_every_hash_holds(name: str, trained: dict[str, Path], tmp_path: Path) -> None:
    kind, damage, reason = DAMAGES[name]
    directory = copy(trained[kind], tmp_path)
    damage(directory)
    commit_again(directory, kind)
    assert verify_checkpoint(directory, level=2).good
    verdict = verify_checkpoint(directory, level=3)
    assert not verdict.good
    assert reason in verdict.reason
    (directory / MANIFEST).unlink()
    assert reason in verify_foreign(directory).reason


def test_a_checkpoint_of_another_tool_is_taken_on_the_users_word_only(trained: dict[str, Path], tmp_path: Path) -> None:
    directory = copy(trained["plain"], tmp_path)
    (directory / MANIFEST).unlink()
    (verdict,) = verify_path_or_run(str(tmp_path))
    assert not verdict.good
    assert verdict.reason.startswith("no MANIFEST.json: the save was not finished; ")
    assert verdict.reason.endswith(
        "structure and meaning hold, nobody knows the bytes; resume --accept-unverified takes it"
    )
    assert choose_checkpoint(tmp_path).chosen is None
    assert choose_checkpoint(tmp_path, accept_unverified=True).chosen == directory
    assert not (directory / MANIFEST).exists()
    manifest = adopt_checkpoint(directory)
    assert (manifest.step, manifest.world_size, manifest.metadata) == (4, 1, {"accepted_unverified": True})
    assert choose_checkpoint(tmp_path, level=3).chosen == directory


def test_every_large_tensor_of_a_shard_is_looked_at(trained: dict[str, Path], tmp_path: Path) -> None:
    """fp32 master and two moments, each the largest entries of the shard: one value off, or none at all."""
    with zipfile.ZipFile(trained["zero2"] / SHARD) as archive:
        size = max(info.file_size for info in archive.infolist())
        large = [info.filename for info in archive.infolist() if info.file_size == size]
    found = set()
    for place, entry in enumerate(large):
        for value in (NAN, struct.pack("<f", 1.0)):
            directory = copy(trained["zero2"], tmp_path / f"{place}{value.hex()}")
            rewrite(directory / SHARD, entry, lambda data, value=value: value + data[4:])  # type: ignore[misc]
            commit_again(directory, "zero2")
            found.add(re.sub(r"base_model\S+|'.*'", "NAME", verify_checkpoint(directory, level=3).reason))
    assert "the optimizer shard of rank 1: state.0.exp_avg is not finite" in found
    assert "the optimizer shard of rank 1: state.0.exp_avg_sq is not finite" in found
    assert "the fp32 master of NAME is not what DeepSpeed's module holds" in found
    assert "the optimizer shard of rank 1: single_partition_of_fp32_groups[0] is not finite" in found
