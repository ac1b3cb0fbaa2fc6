"""The run directories: one per fine-tune, made whole or not at all, and found by whatever name a user has for them."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_jobs.errors import RunError, RunExistsError, RunNotFoundError
from lora_jobs.runs.durable import explain_errors, parse_lines, sync_directory, write_atomic

if TYPE_CHECKING:
    from collections.abc import Mapping

SPEC_FILE = "spec.yaml"
SWEEP_FILE = "sweep.json"
SUBMISSIONS_FILE = "submissions.jsonl"
ATTEMPTS_FILE = "attempts.jsonl"
_RUN_ID = re.compile(r"(?P<name>[A-Za-z][A-Za-z0-9._-]*)-(?P<number>[0-9]{1,9})", re.ASCII)
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)
_ARRAY_JOB = re.compile(r"(?P<array>[0-9]+)_(?:[0-9]+|\[[0-9,%-]+\])", re.ASCII)


@dataclass(frozen=True, slots=True)
class Run:
    """One fine-tune, however many times it starts: a directory and the names of what is in it."""

    directory: Path

    @property
    def id(self) -> str:
        return self.directory.name

    @property
    def name(self) -> str:
        """The spec's name: the id without its number."""
        match = _RUN_ID.fullmatch(self.id)
        return self.id if match is None else match["name"]

    @property
    def spec_path(self) -> Path:
        return self.directory / SPEC_FILE

    @property
    def script_path(self) -> Path:
        return self.directory / "script.sbatch"

    @property
    def deepspeed_path(self) -> Path:
        return self.directory / "deepspeed.json"

    @property
    def estimate_path(self) -> Path:
        return self.directory / "estimate.json"

    @property
    def environment_path(self) -> Path:
        return self.directory / "environment.json"

    @property
    def attempts_path(self) -> Path:
        return self.directory / ATTEMPTS_FILE

    @property
    def submissions_path(self) -> Path:
        return self.directory / SUBMISSIONS_FILE

    @property
    def metrics_path(self) -> Path:
        return self.directory / "metrics.jsonl"

    @property
    def logs(self) -> Path:
        return self.directory / "logs"

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.directory / "adapter"

    @property
    def submitit(self) -> Path:
        return self.directory / "submitit"


def find_runs_root() -> Path:
    """$LORA_JOBS_HOME, else ./runs; absolute, whether or not it exists."""
    named = os.environ.get("LORA_JOBS_HOME")
    return Path(named).expanduser().absolute() if named else Path("runs").absolute()


def next_run_id(root: Path, name: str) -> str:
    """`name-N`, N one above the largest that is there. Raises RunError."""
    numbers = [0]
    for directory in _list_directories(root):
        match = _RUN_ID.fullmatch(directory.name)
        if match is not None and match["name"] == name:
            numbers.append(int(match["number"]))
    return f"{name}-{max(numbers) + 1}"


def create_run(root: Path, run_id: str, files: Mapping[str, str]) -> Run:
    """Makes the run's directory (mode 0700) with logs/, checkpoints/ and these files in it, spec.yaml last.

    Raises RunExistsError when another submission took the id first, RunError when it cannot be written; what this
    call made is then gone again. A directory without spec.yaml is no run, so a kill in between leaves none either.
    """
    if _RUN_ID.fullmatch(run_id) is None:
        raise RunError(f"{run_id!r} is no run id: wanted NAME-NUMBER")
    unsafe = [name for name in files if _FILE_NAME.fullmatch(name) is None]
    if unsafe:
        raise RunError(f"{unsafe[0]!r} is no plain file name: a run's files stand side by side in its directory")
    run = Run(root / run_id)
    with explain_errors("make the directory", run.directory):
        root_is_new = not root.exists()
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            run.directory.mkdir(mode=0o700)
        except FileExistsError as error:
            message = f"{run.directory} is there already: another submission took this id"
            raise RunExistsError(message, hint="submit again: the next number is free") from error
    try:
        _fill(run, files)
    except BaseException:
        shutil.rmtree(run.directory, ignore_errors=True)
        if root_is_new:
            with contextlib.suppress(OSError):
                root.rmdir()
        raise
    return run


def discard_run(run: Run) -> None:
    """Takes away a run that was made but never submitted."""
    shutil.rmtree(run.directory, ignore_errors=True)


def _fill(run: Run, files: Mapping[str, str]) -> None:
    with explain_errors("write", run.directory):
        run.logs.mkdir(mode=0o700)
        run.checkpoints.mkdir(mode=0o700)
        for name in sorted(files, key=lambda name: name == SPEC_FILE):
            write_atomic(run.directory / name, files[name])
        sync_directory(run.directory.parent)


def list_runs(root: Path) -> list[Run]:
    """Every run under the root, the one submitted last first; of each, two files' times are read. Raises RunError."""
    found = []
    with explain_errors("list", root):
        try:
            names = os.listdir(root)  # noqa: PTH208 - ten thousand runs: names and stats, no Path objects
        except FileNotFoundError:
            return []
    for name in names:
        inside = _list_tasks(root, name) if _find_time(f"{root}/{name}/{SWEEP_FILE}") is not None else (name,)
        for path in inside:
            made = _find_time(f"{root}/{path}/{SPEC_FILE}")
            if made is not None:
                match = _RUN_ID.fullmatch(path.rpartition("/")[2])
                number = 0 if match is None else int(match["number"])
                found.append((_find_time(f"{root}/{path}/{SUBMISSIONS_FILE}") or made, number, path))
    return [Run(root / path) for *_, path in sorted(found, reverse=True)]


def _list_tasks(root: Path, sweep: str) -> list[str]:
    """The paths of a sweep's runs below the root."""
    return [f"{sweep}/{name}" for name in os.listdir(root / sweep)]  # noqa: PTH208


def _find_time(path: str) -> int | None:
    """When a file was last written; None where there is no such file."""
    with contextlib.suppress(OSError):
        status = os.stat(path)  # noqa: PTH116
        return status.st_mtime_ns if stat.S_ISREG(status.st_mode) else None
    return None


def _list_directories(root: Path) -> list[Path]:
    with explain_errors("list", root):
        try:
            return [path for path in root.iterdir() if path.is_dir()]
        except FileNotFoundError:
            return []


def find_run(job: str | None, root: Path) -> Run:
    """The run that `job` means: a run id, a name (its newest run), a directory, any job id it ever had; None: the last.

    Only a path as typed leads to a directory; an id is never joined to another one. Raises RunNotFoundError.
    """
    runs = list_runs(root)
    if job is None:
        if runs:
            return runs[0]
        raise RunNotFoundError(f"no runs in {root}", hint="lora-jobs submit SPEC starts one")
    for found in (
        _find_by_id(job, runs),
        _find_by_job_id(job, runs),
        _find_by_name(job, runs),
        _find_by_directory(job),
    ):
        if found is not None:
            return found
    raise _not_found(job, root, runs)


def _find_by_id(job: str, runs: list[Run]) -> Run | None:
    return next((run for run in runs if run.id == job), None)


def _find_by_name(job: str, runs: list[Run]) -> Run | None:
    named = [run for run in runs if run.id != run.name == job]
    return max(named, key=lambda run: int(run.id.rpartition("-")[2]), default=None)


def _find_by_directory(job: str) -> Run | None:
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        directory = Path(job).expanduser()
        if (directory / SPEC_FILE).is_file() and directory.is_dir():
            return Run(directory.absolute() if ".." not in directory.parts else directory.resolve())
    return None


def _find_by_job_id(job: str, runs: list[Run]) -> Run | None:
    """The newest run with this job id; of an array, the whole and its tasks stand for each other."""
    if not job[:1].isdigit():
        return None
    wanted = _find_array(job)
    of_array = None
    for name in (SUBMISSIONS_FILE, ATTEMPTS_FILE):
        for run in runs:
            ids = _read_job_ids(run, name, wanted)
            if job in ids:
                return run
            if of_array is None and wanted in {_find_array(job_id) for job_id in ids}:
                of_array = run
    return of_array


def _find_array(job_id: str) -> str:
    match = _ARRAY_JOB.fullmatch(job_id)
    return job_id if match is None else match["array"]


def _read_job_ids(run: Run, name: str, digits: str) -> list[str]:
    """Job ids in one file of the run's records; one without these digits is not parsed."""
    with explain_errors("read", run.directory):
        try:
            with open(f"{run.directory}/{name}", "rb") as file:  # noqa: PTH123 - ten thousand runs: no Path objects
                data = file.read()
        except FileNotFoundError:
            return []
    if digits.encode() not in data:
        return []
    return [record["job_id"] for record in parse_lines(data) if isinstance(record.get("job_id"), str)]


def _not_found(job: str, root: Path, runs: list[Run]) -> RunNotFoundError:
    shown = ascii(job)[1:-1] if not job.isprintable() else job
    known = list(dict.fromkeys([run.id for run in runs] + [run.name for run in runs]))
    near = difflib.get_close_matches(job, known, n=3, cutoff=0.5)
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    hint = "lora-jobs status --all lists your runs" if runs else "no run is there yet: lora-jobs submit SPEC starts one"
    return RunNotFoundError(f"no run {shown!r} in {root}{meant}", hint=hint)
