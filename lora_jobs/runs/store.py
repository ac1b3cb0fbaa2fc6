"""The run directories: one per fine-tune, made whole or not at all, and found by whatever name a user has for them."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from lora_jobs.errors import RunError, RunExistsError, RunNotFoundError
from lora_jobs.runs.durable import explain_errors, parse_lines, sync_directory, write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SPEC_FILE = "spec.yaml"
SWEEP_FILE = "sweep.json"
SWEEP_MARK = "-sweep-"
"""In the name of every sweep's directory, NAME-sweep-N."""
SUBMISSIONS_FILE = "submissions.jsonl"
ATTEMPTS_FILE = "attempts.jsonl"
_RUN_ID = re.compile(r"(?P<name>[A-Za-z][A-Za-z0-9._-]*)-(?P<number>[0-9]{1,9})", re.ASCII)
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)
_ARRAY_JOB = re.compile(r"(?P<array>[0-9]+)_(?:[0-9]+|\[[0-9,:%-]+\])", re.ASCII)


class Run(Struct, frozen=True):
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
    """Every run under the root, the one submitted last first. Raises RunError."""
    return [Run(root / path) for path in list_run_paths(root)]


def list_run_paths(root: Path) -> list[str]:
    """The runs' paths below the root ("a-1", "s-sweep-1/s-sweep-1-0"), the one submitted last first. Raises RunError.

    Of each that was submitted, one file's time is read, and nothing else: there may be ten thousand.
    """
    found = []
    with _open_root(root) as directory:
        if directory is None:
            return []
        for name in os.listdir(directory):  # noqa: PTH208 - names, no Path objects
            is_sweep = SWEEP_MARK in name and find_time(f"{name}/{SWEEP_FILE}", directory) is not None
            for path in [f"{name}/{task}" for task in os.listdir(root / name)] if is_sweep else [name]:  # noqa: PTH208
                begun = _find_begin(path, directory)
                if begun is not None:
                    found.append((begun, _find_number(path), path))
    return [path for *_, path in sorted(found, reverse=True)]


@contextlib.contextmanager
def _open_root(root: Path) -> Iterator[int | None]:
    """A descriptor of the directory, so that names in it are looked up from there; None where there is none."""
    with explain_errors("list", root):
        try:
            descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            yield None
            return
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def find_time(path: str, directory: int | None = None) -> int | None:
    """When a file was last written, in ns; None where there is no such file. `directory`: a descriptor to start at."""
    try:
        status = os.stat(path, dir_fd=directory)
    except OSError:
        return None
    return status.st_mtime_ns if stat.S_ISREG(status.st_mode) else None


def _find_begin(path: str, directory: int) -> int | None:
    """When a run was last submitted, or made, in ns; None where no run is there: the spec is written before either."""
    return find_time(f"{path}/{SUBMISSIONS_FILE}", directory) or find_time(f"{path}/{SPEC_FILE}", directory)


def _find_number(run: str) -> int:
    """N of a run's id or path NAME-N; 0 where it has none."""
    number = run.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0


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
    paths = list_run_paths(root)
    if job is None:
        if paths:
            return Run(root / paths[0])
        raise RunNotFoundError(f"no runs in {root}", hint="lora-jobs submit SPEC starts one")
    path = _find_by_id(job, paths) or _find_by_job_id(job, root, paths) or _find_by_name(job, paths)
    found = _find_by_directory(job) if path is None else Run(root / path)
    if found is not None:
        return found
    raise _not_found(job, root, [Run(root / path) for path in paths])


def _find_by_id(job: str, paths: list[str]) -> str | None:
    return next((path for path in paths if path.rpartition("/")[2] == job), None)


def _find_by_name(job: str, paths: list[str]) -> str | None:
    """The highest number of this name."""
    matches = [(path, _RUN_ID.fullmatch(path.rpartition("/")[2])) for path in paths]
    named = [(int(match["number"]), path) for path, match in matches if match is not None and match["name"] == job]
    return max(named)[1] if named else None


def _find_by_directory(job: str) -> Run | None:
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        directory = Path(job).expanduser()
        if (directory / SPEC_FILE).is_file() and directory.is_dir():
            return Run(directory.absolute() if ".." not in directory.parts else directory.resolve())
    return None


def _find_by_job_id(job: str, root: Path, paths: list[str]) -> str | None:
    """The newest run with this job id; of an array, the whole and its tasks stand for each other."""
    if not job[:1].isdigit():
        return None
    wanted = _find_array(job)
    of_array = None
    for name in (SUBMISSIONS_FILE, ATTEMPTS_FILE):
        for path in paths:
            ids = _read_job_ids(f"{root}/{path}/{name}", wanted)
            if job in ids:
                return path
            if of_array is None and wanted in {_find_array(job_id) for job_id in ids}:
                of_array = path
    return of_array


def _find_array(job_id: str) -> str:
    match = _ARRAY_JOB.fullmatch(job_id)
    return job_id if match is None else match["array"]


def _read_job_ids(path: str, digits: str) -> list[str]:
    """Job ids in one file of a run's records; one without these digits is not parsed."""
    data = b""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while piece := os.read(descriptor, 1 << 16):
                data += piece
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error
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
