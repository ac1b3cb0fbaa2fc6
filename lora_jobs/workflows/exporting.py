"""A finished adapter as something to share: merged into its model, or packed with a model card."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import asdict

from lora_jobs.checkpoints import MANIFEST, Manifest, commit_checkpoint, verify_checkpoint
from lora_jobs.cluster.commands import run_command
from lora_jobs.cluster.surroundings import read_disk
from lora_jobs.errors import CheckpointError, RunError, SpecError
from lora_jobs.runs import Run, find_run, find_runs_root, find_sweep
from lora_jobs.runs.durable import sync_directory, sync_filesystem
from lora_jobs.spec import load_spec
from lora_jobs.units import MIB, format_gib
from lora_jobs.workflows.carding import describe_model
from lora_jobs.workflows.report_origin import load_values, read_part

if TYPE_CHECKING:
    from collections.abc import Iterator

MERGE_SECONDS = 4 * 3600.0
ARCHIVES = (".tar.gz", ".tgz", ".tar")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
RESERVE_BYTES = 64 * MIB
SPEC_NAME = "job.yaml"
"""Not spec.yaml: a folder with that name in it is a run."""
NOT_PACKED = frozenset({"README.md", "training_args.bin", "optimizer.pt", MANIFEST})
"""Not of the adapter: PEFT's empty card, pickles that nobody should open."""


class Exported(Struct, frozen=True):
    """What was written. Of a merge: how far its logits are from the adapter's, and the largest of those."""

    run: str
    path: str
    bytes: int
    dtype: str | None = None
    difference: float | None = None
    scale: float | None = None
    untied: bool | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def merge_run(job: str | None, target: Path, *, dtype: str | None = None) -> Exported:
    """Merge a run's adapter into its base model with PEFT, in the job's environment; the tokenizer goes with it.

    Errors: CheckpointError where the adapter does not verify; RunError for want of room, or where merging fails;
    SpecError for a target that is there, or an unknown dtype. Nothing is left of a merge that failed.
    """
    run, manifest = find_adapter(job)
    spec = load_spec(run.spec_path)
    dtype = dtype or spec.model.dtype
    if dtype not in DTYPE_BYTES:
        raise SpecError(f"unknown dtype {dtype!r}: wanted one of {', '.join(DTYPE_BYTES)}")
    refuse_existing(target)
    estimate = load_values(run.estimate_path)
    parameters = read_part(estimate, "parameters").get("base")
    weights = (parameters if isinstance(parameters, int) else 0) * DTYPE_BYTES[dtype]
    refuse_full_disk(target, manifest.total_bytes + weights)
    python = read_python(run)
    with place_whole(target) as directory:
        request = {"spec": spec.to_values(), "adapter": str(run.adapter), "target": str(directory), "dtype": dtype}
        answer = ask_merge(python, request)
        write_card(run, manifest, directory, merged=True)
    return Exported(
        run.id, str(target), measure(target), dtype, answer["difference"], answer["scale"], answer["untied"]
    )


def pack_run(job: str | None, target: Path) -> Exported:
    """Copy a run's adapter with a model card and its spec into a folder, or a .tar.gz. `verify` knows such a folder.

    Errors: as `merge_run`.
    """
    run, manifest = find_adapter(job)
    refuse_existing(target)
    refuse_full_disk(target, 2 * manifest.total_bytes)
    archive = next((ending for ending in ARCHIVES if target.name.endswith(ending)), None)
    with place_whole(target) as directory:
        folder = directory / target.name.removesuffix(archive) if archive else directory
        copy_adapter(run, manifest, folder)
        write_card(run, manifest, folder, merged=False)
        commit_checkpoint(folder, step=manifest.step, world_size=1, metadata={**manifest.metadata, "exported": run.id})
        share(folder)
        if archive:
            write_archive(folder, directory / "archive", compress=archive != ".tar")
    return Exported(run.id, str(target), measure(target))


def find_adapter(job: str | None) -> tuple[Run, Manifest]:
    """The run with a finished adapter, every byte of which verifies; and the adapter's manifest.

    Errors: CheckpointError, RunNotFoundError; SpecError for a sweep.
    """
    root = find_runs_root()
    if (sweep := find_sweep(job, root)) is not None:
        best = f"lora-jobs compare {sweep.name} ranks them; then lora-jobs export {sweep.tasks[0].run}"
        raise SpecError(f"{sweep.name} is a sweep, one run is exported", hint=best)
    run = find_run(job, root)
    if not run.adapter.is_dir():
        raise CheckpointError(
            f"{run.id} has no finished adapter yet", path=run.adapter, hint=f"lora-jobs status {run.id}"
        )
    verdict = verify_checkpoint(run.adapter)
    if not verdict.good or verdict.manifest is None:
        raise CheckpointError(
            f"the adapter of {run.id} does not verify, so it is not exported: {verdict.reason}",
            path=run.adapter,
            hint=f"lora-jobs resume {run.id} saves it anew from its newest good checkpoint",
        )
    return run, verdict.manifest


def refuse_existing(target: Path) -> None:
    """Nothing that is there is ever written over."""
    if os.path.lexists(target):
        raise SpecError(f"{target} exists already", hint="choose another name: nothing was changed")


def refuse_full_disk(target: Path, needed: int) -> None:
    """RunError where the target's file system has no room for `needed` bytes."""
    disk = read_disk(target.absolute().parent)
    if disk.free_bytes < needed + RESERVE_BYTES:
        raise RunError(
            f"{disk.directory} has {format_gib(disk.free_bytes)} free, this needs {format_gib(needed + RESERVE_BYTES)}",
            hint="free some space there, or export to another disk",
        )


@contextlib.contextmanager
def place_whole(target: Path) -> Iterator[Path]:
    """A directory beside `target` that takes its name when the block ends well, and is gone when it does not.

    Where the block wrote a file `archive` in it, that file takes the name instead.
    """
    parent = target.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(dir=parent, prefix=f".{target.name}.", suffix=".tmp"))
    except OSError as error:
        raise RunError(f"can't write to {parent}: {error.strerror}", hint="choose another directory") from error
    try:
        yield directory
        refuse_existing(target)
        share(directory)
        sync_filesystem(directory)
        archive = directory / "archive"
        (archive if archive.is_file() else directory).rename(target)
        sync_directory(parent)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def share(directory: Path) -> None:
    """Modes by this process's umask, for all that is in it: an export is to be shared, a run is private."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (directory, *directory.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def read_python(run: Run) -> str:
    """The interpreter that the run was submitted with, if it is on this machine; else this one."""
    stored = load_values(run.environment_path).get("python")
    return stored if isinstance(stored, str) and shutil.which(stored) else sys.executable


def ask_merge(python: str, request: dict[str, Any]) -> dict[str, Any]:
    """Merge in a process of the job's environment. Errors: RunError with what it said."""
    argv = (python, "-P", "-W", "ignore", "-m", "lora_jobs.training.merge")
    answered = run_command(argv, timeout=MERGE_SECONDS, input=json.dumps(request))
    try:
        values = dict(json.loads(answered.stdout))
    except ValueError as error:
        said = (answered.stderr.strip().splitlines() or ["nothing"])[-1][:300]
        ended = "was killed, perhaps for memory" if answered.returncode == -9 else f"ended with {answered.returncode}"
        raise RunError(
            f"merging in {python} {ended} and said: {said}",
            hint="it needs torch, transformers and peft there, and the base model in host memory twice over",
        ) from error
    if "error" in values:
        raise RunError(f"merging failed: {values['error']}", hint=values["hint"])
    return values


def copy_adapter(run: Run, manifest: Manifest, folder: Path) -> None:
    """The files of the adapter that others need, and the spec."""
    folder.mkdir(exist_ok=True)
    for name in manifest.files:
        if Path(name).name not in NOT_PACKED and not name.endswith((".bin", ".pt")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run.adapter / name, folder / name)
    shutil.copyfile(run.spec_path, folder / SPEC_NAME)


def write_card(run: Run, manifest: Manifest, folder: Path, *, merged: bool) -> None:
    """README.md of the export."""
    (folder / "README.md").write_text(describe_model(run, manifest, merged=merged), encoding="utf-8")


def write_archive(folder: Path, path: Path, *, compress: bool) -> None:
    """The folder as a tar file, without this machine's users in it."""

    def forget(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        return entry

    with tarfile.open(path, "w:gz" if compress else "w") as archive:
        archive.add(folder, arcname=folder.name, filter=forget)


def measure(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return (
        path.stat().st_size
        if path.is_file()
        else sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
    )
