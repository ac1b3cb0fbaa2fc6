"""Every way in which a checkpoint was seen to break, and the verdict that it gets."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lora_jobs.checkpoints import MANIFEST, commit_checkpoint, load_manifest, verify_checkpoint
from lora_jobs.checkpoints.structure import check_structure
from lora_jobs.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

    Maker = Callable[..., Path]
    Damage = Callable[[Path], object]

ADAPTER = "adapter_model.safetensors"
SHARD = "global_step8/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"


def _flip_a_bit(name: str) -> Damage:
    def flip(directory: Path) -> None:
        content = bytearray((directory / name).read_bytes())
        content[len(content) // 2] ^= 1
        (directory / name).write_bytes(content)

    return flip


def _replace_by_link(name: str) -> Damage:
    def link(directory: Path) -> None:
        (directory / name).rename(directory.parent / "elsewhere")
        (directory / name).symlink_to(directory.parent / "elsewhere")

    return link


def _same_size(name: str, old: str, new: str) -> Damage:
    return lambda directory: (directory / name).write_text((directory / name).read_text().replace(old, new))


# name: (what happens, the lowest level that finds it, the reason)
DAMAGES: dict[str, tuple[Damage, int, str]] = {
    "manifest missing": (lambda d: (d / MANIFEST).unlink(), 0, "no MANIFEST.json: the save was not finished"),
    "manifest edited": (_same_size(MANIFEST, '"step": 8', '"step": 9'), 0, "was changed after it was written"),
    "manifest cut short": (lambda d: os.truncate(d / MANIFEST, 100), 0, "MANIFEST.json is not a manifest"),
    "adapter missing": (lambda d: (d / ADAPTER).unlink(), 0, f"{ADAPTER} is missing"),
    "two files missing": (
        lambda d: [(d / ADAPTER).unlink(), (d / "latest").unlink()],
        0,
        f"{ADAPTER} is missing (and 1 more)",
    ),
    "shard missing": (lambda d: (d / SHARD).unlink(), 0, f"{SHARD} is missing"),
    "DeepSpeed's folder missing": (
        lambda d: shutil.rmtree(d / "global_step8"),
        0,
        "_states.pt is missing (and 2 more)",
    ),
    "shard cut short": (lambda d: os.truncate(d / SHARD, 100), 0, f"{SHARD} is 100 bytes, "),
    "shard empty": (lambda d: os.truncate(d / SHARD, 0), 0, f"{SHARD} is 0 bytes, "),
    "shard zeroed": (lambda d: (d / SHARD).write_bytes(bytes((d / SHARD).stat().st_size)), 1, "not a whole torch file"),
    "bit of a shard": (_flip_a_bit(SHARD), 1, f"{SHARD} is damaged inside: archive/data/0 fails its checksum"),
    "bit of the adapter": (_flip_a_bit(ADAPTER), 2, f"{ADAPTER} is not what was committed: its hash differs"),
    "adapter_config edited": (_same_size("adapter_config.json", "8", "9"), 2, "adapter_config.json is not what was"),
    "adapter_config no JSON": (_same_size("adapter_config.json", "}", " "), 1, "adapter_config.json is not JSON"),
    "trainer state of another step": (
        _same_size("trainer_state.json", '"global_step": 8', '"global_step": 9'),
        0,
        "trainer_state.json is of step 9, the checkpoint of step 8",
    ),
    "latest names another folder": (
        _same_size("latest", "global_step8", "global_step7"),
        0,
        "latest names the folder 'global_step7', which is not there",
    ),
    "a file too many": (
        lambda d: (d / "global_step8" / "zero_pp_rank_2_mp_rank_00_optim_states.pt").write_text("x"),
        0,
        "global_step8/zero_pp_rank_2_mp_rank_00_optim_states.pt is not in the manifest",
    ),
    "a file became a link": (_replace_by_link(ADAPTER), 0, f"{ADAPTER} is a symbolic link"),
    "a folder became a link": (_replace_by_link("global_step8"), 0, "global_step8 is a symbolic link"),
    "a file became a folder": (
        lambda d: [(d / ADAPTER).unlink(), (d / ADAPTER).mkdir()],
        0,
        f"{ADAPTER} is missing",
    ),
    "a file became a pipe": (
        lambda d: [(d / ADAPTER).unlink(), os.mkfifo(d / ADAPTER)],
        0,
        f"{ADAPTER} is not a plain file",
    ),
}


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("shape", [{}, {"world_size": 2, "deepspeed": True}, {"world_size": 3}], ids=str)
def test_a_committed_checkpoint_is_good(shape: dict[str, int], level: int, commit: Maker) -> None:
    directory = commit(8, **shape)
    verdict = verify_checkpoint(directory, level=level)
    manifest = load_manifest(directory)
    checked = {0: "sizes and step", 1: "sizes, step and structure", 2: "sizes, step, structure and hashes"}[level]
    assert (verdict.path, verdict.step, verdict.good) == (directory, 8, True)
    assert verdict.reason == f"{len(manifest.files)} files: {checked} hold"
    assert verdict.to_json() == {
        "path": str(directory),
        "step": 8,
        "good": True,
        "reason": verdict.reason,
        "committed_at": manifest.created_at,
        "bytes": manifest.total_bytes,
    }


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_at_its_level_and_above(name: str, commit: Maker) -> None:
    directory = commit(8, world_size=2, deepspeed=True)
    damage, lowest, reason = DAMAGES[name]
    damage(directory)
    verdicts = [verify_checkpoint(directory, level=level) for level in (0, 1, 2)]
    assert [verdict.good for verdict in verdicts] == [level < lowest for level in (0, 1, 2)]
    assert reason in verdicts[lowest].reason
    assert [verdict.step for verdict in verdicts] == [8, 8, 8]
    assert verdicts[2].committed_at is None


@pytest.mark.parametrize("name", ["checkpoint-9", "checkpoint-08", "checkpoint-80", "best"])
def test_a_renamed_folder_is_not_the_checkpoint_it_says(name: str, commit: Maker) -> None:
    directory = commit(8)
    renamed = directory.rename(directory.with_name(name))
    verdict = verify_checkpoint(renamed, level=0)
    assert (verdict.good, verdict.reason) == (False, f"the folder is named {name}, its content is checkpoint-8")


def test_the_manifest_of_another_checkpoint_is_found(commit: Maker) -> None:
    older, newer = commit(8), commit(9)
    shutil.copy(older / MANIFEST, newer / MANIFEST)
    verdict = verify_checkpoint(newer, level=0)
    assert (verdict.good, verdict.reason) == (False, "the folder is named checkpoint-9, its content is checkpoint-8")


def test_an_adapter_renamed_to_a_checkpoint_cannot_be_resumed_from(tmp_path: Path, commit: Maker) -> None:
    checkpoint = commit(8)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", ADAPTER):
        shutil.copy(checkpoint / name, adapter / name)
    commit_checkpoint(adapter, step=12, world_size=1)
    assert verify_checkpoint(adapter).good
    verdict = verify_checkpoint(adapter.rename(tmp_path / "checkpoint-12"))
    assert (verdict.good, verdict.reason) == (False, "trainer_state.json is missing")


def test_what_is_no_folder_gets_a_verdict_too(tmp_path: Path, commit: Maker) -> None:
    (tmp_path / "checkpoint-1").symlink_to(commit(8))
    (tmp_path / "checkpoint-2").write_text("")
    (tmp_path / "checkpoint-3").mkdir()
    reasons = [verify_checkpoint(tmp_path / f"checkpoint-{number}").reason for number in (1, 2, 3, 4)]
    assert reasons == [
        f"{tmp_path}/checkpoint-1 is a symbolic link",
        f"{tmp_path}/checkpoint-2 is not a directory",
        "no MANIFEST.json: the save was not finished",
        f"{tmp_path}/checkpoint-4 does not exist",
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user, to be refused")
@pytest.mark.parametrize("closed", ["checkpoint-8", f"checkpoint-8/{MANIFEST}", "checkpoint-8/optimizer.pt"])
def test_what_cannot_be_read_gets_a_verdict_not_a_traceback(closed: str, commit: Maker) -> None:
    code = (
        "import os, sys; from pathlib import Path; from lora_jobs.checkpoints import verify_checkpoint\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "verdict = verify_checkpoint(Path(sys.argv[1])); print(verdict.good, verdict.reason)"
    )
    with tempfile.TemporaryDirectory() as open_to_all:
        Path(open_to_all).chmod(0o755)
        directory = Path(shutil.copytree(commit(8), Path(open_to_all) / "checkpoint-8"))
        for path in directory.rglob("*"):
            path.chmod(0o644)
        (Path(open_to_all) / closed).chmod(0o000)
        done = subprocess.run([sys.executable, "-c", code, str(directory)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("False ")
    assert "can't be read: Permission denied" in done.stdout


def _safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _tensor(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


BROKEN_SAFETENSORS = {
    "empty": (b"", "is cut short: 0 bytes"),
    "seven bytes": (b"1234567", "is cut short: 7 bytes"),
    "header longer than the file": (struct.pack("<Q", 1000) + b"{}", "is cut short"),
    "header length is huge": (b"\xff" * 16, "is cut short"),
    "header is no JSON": (_safetensors(b"{{{{"), "has a damaged safetensors header"),
    "header is a list": (_safetensors([1]), "has a damaged safetensors header"),
    "tensor is a number": (_safetensors({"a": 1}), "has a damaged safetensors header"),
    "no offsets": (_safetensors({"a": {"dtype": "F32", "shape": [1]}}), "has a damaged safetensors header"),
    "gap": (_safetensors({"a": _tensor("F32", [1], 4, 8)}, bytes(8)), "tensor of shape [1] at bytes 4 to 8"),
    "wrong shape": (_safetensors({"a": _tensor("BF16", [3], 0, 4)}, bytes(4)), "tensor of shape [3] at bytes 0 to 4"),
    "overlap": (
        _safetensors({"a": _tensor("F32", [1], 0, 4), "b": _tensor("F32", [1], 2, 6)}, bytes(6)),
        "tensor of shape [1] at bytes 2 to 6",
    ),
    "data cut short": (_safetensors({"a": _tensor("F32", [2], 0, 8)}, bytes(4)), "its header describes"),
    "data too long": (_safetensors({"a": _tensor("F32", [2], 0, 8)}, bytes(12)), "its header describes"),
}


@pytest.mark.parametrize("name", BROKEN_SAFETENSORS)
def test_a_broken_safetensors_file_is_found_by_its_own_format(name: str, tmp_path: Path) -> None:
    content, reason = BROKEN_SAFETENSORS[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        check_structure(path, path.name)
    assert reason in caught.value.message


def test_whole_files_of_every_kind_pass(tmp_path: Path) -> None:
    scalars = {"s": _tensor("F32", [], 0, 4), "none": _tensor("BF16", [0, 4], 4, 4), "new": _tensor("F4", [2], 4, 5)}
    contents = {
        "model.safetensors": _safetensors(scalars, bytes(5)),
        "empty.safetensors": _safetensors({}),
        "log.json": b'{"loss": NaN}',
        "notes.txt": b"of no format that is known here",
        "tokenizer.model": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        check_structure(tmp_path / name, name, crc=True)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "training_args.bin", "deep/pytorch_model-1.bin"])
def test_a_torch_file_must_be_a_whole_archive(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"moments": "0" * 1000}, protocol=2))
    check_structure(path, name, crc=True)
    os.truncate(path, 1000)
    with pytest.raises(CheckpointError, match="is not a whole torch file"):
        check_structure(path, name)


def test_a_manifest_is_not_kept_waiting_by_what_it_lists(commit: Maker) -> None:
    """A hostile list of files costs no more than its own size: nothing outside the folder is opened."""
    directory = commit(8)
    values = json.loads((directory / MANIFEST).read_text())
    values["files"]["../../../../dev/zero"] = {"bytes": 0, "hash": "0" * 32}
    (directory / MANIFEST).write_text(json.dumps(values))
    verdict = verify_checkpoint(directory)
    assert not verdict.good
    assert "'../../../../dev/zero' is not a path inside the checkpoint" in verdict.reason
