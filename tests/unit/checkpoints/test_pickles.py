"""What a torch file would run: told without running it, and refused unless a checkpoint needs it."""

from __future__ import annotations

import collections
import os
import pickle
import pickletools
import subprocess
import zipfile
from typing import TYPE_CHECKING, Any

import pytest

from lora_jobs.checkpoints import commit_checkpoint, verify_checkpoint
from lora_jobs.checkpoints.pickles import ALLOWED_GLOBALS, list_globals
from lora_jobs.checkpoints.structure import check_structure
from lora_jobs.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Maker = Callable[..., Path]


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def write_archive(path: Path, data: bytes, *, compression: int = zipfile.ZIP_STORED, **more: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in more.items():
            archive.writestr(f"archive/{name}", content)
    return path


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_names_its_imports(protocol: int) -> None:
    value = [Call(os.system, "true"), collections.OrderedDict(a=1), Call(os.system, "false"), {1, 2}]
    data = pickle.dumps(value, protocol)
    found = set(list_globals(data))
    assert {name for name in found if name.startswith(("posix", "collections"))} == {
        f"{os.system.__module__} system",
        "collections OrderedDict",
    }
    assert set(list_globals(pickletools.optimize(data))) == found


BAD = {
    "a shell command": (pickle.dumps(Call(os.system, "true"), 2), "loading it would run posix.system, which no"),
    "by the stack": (pickle.dumps(Call(os.system, "true"), 4), "loading it would run posix.system"),
    "eval": (b"c__builtin__\neval\n(X\x01\x00\x00\x001tR.", "loading it would run __builtin__.eval"),
    "getattr": (b"cbuiltins\ngetattr\n.", "loading it would run builtins.getattr"),
    "a process": (pickle.dumps(Call(subprocess.run, "true"), 2), "loading it would run commands.run"),
    "an instance": (b"(ios\nsystem\n.", "loading it would run os.system"),
    "a name that is computed": (b"\x80\x04\x8c\x02os\x8c\x06system0\x8c\x06system2\x93.", "computes the name"),
    "a registered class": (b"\x80\x02\x82\x01.", "uses the extension registry"),
    "cut short": (b"\x80\x02}q\x00", "pickle exhausted"),
    "no pickle": (b"hello", "is not safe to load"),
    "empty": (b"", "pickle exhausted"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_no_checkpoint_needs_is_refused(name: str, tmp_path: Path) -> None:
    data, reason = BAD[name]
    path = write_archive(tmp_path / "optimizer.pt", data)
    with pytest.raises(CheckpointError) as caught:
        check_structure(path, path.name)
    assert reason in caught.value.message


GOOD = pickle.dumps({"a": 1}, 2)


def test_an_archive_that_torch_would_read_in_another_way_is_refused(tmp_path: Path) -> None:
    """torch.load runs a file's start as a pickle where it is no zip, and TorchScript where there is a constants.pkl."""
    good = write_archive(tmp_path / "a.pt", GOOD)
    check_structure(good, "a.pt")
    hidden = tmp_path / "b.pt"
    hidden.write_bytes(pickle.dumps(Call(os.system, "true"), 2) + good.read_bytes())
    script = write_archive(tmp_path / "c.pt", GOOD, **{"constants.pkl": GOOD})
    bomb = write_archive(tmp_path / "d.pt", GOOD, compression=zipfile.ZIP_DEFLATED, **{"data/0": bytes(10**6)})
    twice = tmp_path / "e.pt"
    with zipfile.ZipFile(twice, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Call(os.system, "true"), 2))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("archive/data.pkl", GOOD)
    none = tmp_path / "f.pt"
    with zipfile.ZipFile(none, "w") as archive:
        archive.writestr("archive/data/0", b"1")
    for path, reason in (
        (hidden, "does not start as a zip archive"),
        (script, "wanted one data.pkl, found archive/data.pkl, archive/constants.pkl"),
        (bomb, "is compressed"),
        (twice, "two entries have one name"),
        (none, "wanted one data.pkl, found none"),
    ):
        with pytest.raises(CheckpointError) as caught:
            check_structure(path, path.name)
        assert reason in caught.value.message


def test_nothing_that_runs_code_is_among_the_allowed() -> None:
    harmless = {"collections", "_codecs", "builtins", "__builtin__", "torch", "numpy", "deepspeed"}
    assert {name.partition(" ")[0].partition(".")[0] for name in ALLOWED_GLOBALS} == harmless
    assert not {name.split()[-1] for name in ALLOWED_GLOBALS} & {"eval", "exec", "getattr", "__import__", "load"}


def test_a_hostile_file_is_neither_committed_nor_good(save: Maker, commit: Maker) -> None:
    fresh, committed = save(4), commit(8)
    for directory in (fresh, committed):
        write_archive(directory / "scheduler.pt", pickle.dumps(Call(os.system, "true"), 2))
    with pytest.raises(CheckpointError, match=r"scheduler\.pt is not safe to load"):
        commit_checkpoint(fresh, step=4, world_size=1)
    assert not verify_checkpoint(committed).good


def test_the_pickle_of_trainers_arguments_is_never_loaded_and_may_hold_anything(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "training_args.bin", pickle.dumps(Call(os.system, "true"), 2))
    check_structure(path, path.name)
