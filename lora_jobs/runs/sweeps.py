"""Sweeps: a directory with one run per task and sweep.json, written last: without it there is no sweep."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import asdict, replace

from lora_jobs.errors import RunError, RunExistsError
from lora_jobs.runs.durable import append_line, explain_errors, load_lines, sync_filesystem, write_atomic
from lora_jobs.runs.store import SWEEP_FILE, SWEEP_MARK, Run, find_time, list_run_paths, next_run_id
from lora_jobs.runs.submissions import Submission, load_submissions, parse_submissions

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

FOLDERS = ("logs", "checkpoints", "submitit")
_ARRAY = re.compile(r"(?P<array>[0-9]+)(?:_\[[0-9,:%-]+\])?", re.ASCII)


class Task(Struct, frozen=True):
    """One run of a sweep, and the values that make it different."""

    run: str
    values: Mapping[str, Any]


class Sweep(Struct, frozen=True):
    """What sweep.json says; task N is `tasks[N]`. `left_out`: what did not fit, with the bytes that it needs."""

    directory: Path
    spec_name: str
    keys: tuple[str, ...]
    tasks: tuple[Task, ...]
    throttle: int | None = None
    left_out: tuple[Mapping[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def script_path(self) -> Path:
        return self.directory / "script.sbatch"

    @property
    def submissions_path(self) -> Path:
        return self.directory / "submissions.jsonl"

    @property
    def runs(self) -> list[Run]:
        """One run per task, in the order of the array."""
        return [Run(self.directory / task.run) for task in self.tasks]

    def find_values(self, run: Run) -> Mapping[str, Any]:
        """The swept values of one of its runs."""
        return next(task.values for task in self.tasks if task.run == run.id)


def next_sweep_name(root: Path, spec_name: str) -> str:
    """`NAME-sweep-N`, N one above the largest that is there. Raises RunError."""
    return next_run_id(root, f"{spec_name}{SWEEP_MARK.rstrip('-')}")


def create_sweep(
    sweep: Sweep,
    script: str,
    files: Mapping[str, Mapping[str, str | bytes]],
    shared: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Makes the sweep's directory (mode 0700) with a run per task: `files` by run id, then by relative name; `shared`
    files stand beside the script.

    Everything is written, then made durable by one sync, then sweep.json is: a kill before that leaves no sweep.
    Raises RunExistsError when another submission took the name, RunError when it can't be written; nothing is left.
    """
    root_is_new = not sweep.directory.parent.exists()
    with explain_errors("make the directory", sweep.directory):
        sweep.directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            sweep.directory.mkdir(mode=0o700)
        except FileExistsError as error:
            message = f"{sweep.directory} is there already: another submission took this name"
            raise RunExistsError(message, hint="submit again: the next number is free") from error
    try:
        with explain_errors("write", sweep.directory):
            for name, text in {sweep.script_path.name: script, **shared}.items():
                _write(sweep.directory / name, text)
            for run in sweep.runs:
                _fill(run, files[run.id])
            sync_filesystem(sweep.directory)
        write_atomic(sweep.directory / SWEEP_FILE, render_sweep(sweep))
    except BaseException:
        discard_sweep(sweep)
        if root_is_new:
            with contextlib.suppress(OSError):
                sweep.directory.parent.rmdir()
        raise


def discard_sweep(sweep: Sweep) -> None:
    """Takes away a sweep that was made but never submitted; its index first, so that no half of it is ever seen."""
    (sweep.directory / SWEEP_FILE).unlink(missing_ok=True)
    shutil.rmtree(sweep.directory, ignore_errors=True)


def _fill(run: Run, files: Mapping[str, str | bytes]) -> None:
    run.directory.mkdir(mode=0o700)
    for folder in FOLDERS:
        (run.directory / folder).mkdir(mode=0o700)
    for name, content in files.items():
        _write(run.directory / name, content)


def _write(path: Path, content: str | bytes) -> None:
    """A new file, mode 0600; not durable by itself."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content.encode("utf-8") if isinstance(content, str) else content)


def render_sweep(sweep: Sweep) -> str:
    """The text of sweep.json."""
    values = {
        "name": sweep.name,
        "spec": sweep.spec_name,
        "keys": list(sweep.keys),
        "throttle": sweep.throttle,
        "tasks": [{"run": task.run, "values": dict(task.values)} for task in sweep.tasks],
        "left_out": [dict(each) for each in sweep.left_out],
    }
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def load_sweep(directory: Path) -> Sweep:
    """The sweep in a directory. Raises RunError when there is none, or its index can't be read."""
    path = directory / SWEEP_FILE
    with explain_errors("read", path):
        text = path.read_text(encoding="utf-8")
    try:
        values = json.loads(text)
        return Sweep(
            directory=directory,
            spec_name=values["spec"],
            keys=tuple(values["keys"]),
            tasks=tuple(Task(task["run"], task["values"]) for task in values["tasks"]),
            throttle=values["throttle"],
            left_out=tuple(values["left_out"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged: {error}", hint="its runs are whole: lora-jobs status RUN") from error


def find_own_sweep(run: Run) -> Sweep | None:
    """The sweep that a run is a task of, or None."""
    directory = run.directory.parent
    return load_sweep(directory) if (directory / SWEEP_FILE).is_file() else None


def find_sweep(job: str | None, root: Path) -> Sweep | None:
    """The sweep that `job` means: its name, its directory, its array's id; None: the last run's, if it is its last job.

    Raises RunError.
    """
    if job is None:
        newest = next(iter(list_run_paths(root)), "")
        if "/" not in newest or len(load_submissions(Run(root / newest))) > 1:
            return None
        return load_sweep(root / newest.partition("/")[0])
    if "\0" in job:
        return None
    directory = Path(job).expanduser()
    if (directory / SWEEP_FILE).is_file():
        return load_sweep(directory.absolute())
    if "/" not in job and job.strip(".") and find_time(f"{root}/{job}/{SWEEP_FILE}") is not None:
        return load_sweep(root / job)
    match = _ARRAY.fullmatch(job)
    return None if match is None else _find_by_array(match["array"], root)


def _find_by_array(array: str, root: Path) -> Sweep | None:
    for name in list_sweep_names(root):
        known = load_lines(root / name / "submissions.jsonl")
        if any(record.get("job_id") == array and record.get("backend") == "slurm" for record in known):
            return load_sweep(root / name)
    return None


def list_sweep_names(root: Path) -> list[str]:
    """Names of the directories under the root that are sweeps, newest number last. Raises RunError."""
    with explain_errors("list", root):
        try:
            names = os.listdir(root)  # noqa: PTH208 - ten thousand runs: no Path objects
            return sorted(name for name in names if find_time(f"{root}/{name}/{SWEEP_FILE}") is not None)
        except FileNotFoundError:
            return []


def record_array(sweep: Sweep, submission: Submission) -> None:
    """Writes the array's id into the sweep, then each task's into its run; one sync for all. Raises RunError."""
    append_line(sweep.submissions_path, asdict(submission))
    with explain_errors("write", sweep.directory):
        for number, run in enumerate(sweep.runs):
            record = asdict(replace(submission, job_id=f"{submission.job_id}_{number}"))
            _write(run.submissions_path, json.dumps(record) + "\n")
        sync_filesystem(sweep.directory)


def load_sweep_submissions(sweep: Sweep) -> list[Submission]:
    """The array, or the process that starts the tasks on this machine. Raises RunError."""
    return parse_submissions(load_lines(sweep.submissions_path))


def derive_submission(run: Run) -> Submission | None:
    """The array task that a run without a record of its own stands for (a kill in the middle of `record_array`)."""
    sweep = find_own_sweep(run)
    for known in load_sweep_submissions(sweep) if sweep else []:
        if known.backend == "slurm":
            return replace(known, job_id=f"{known.job_id}_{run.id.rpartition('-')[2]}")
    return None


def group_by_sweep(runs: Iterable[Run]) -> dict[Path | Run, Sequence[Run]]:
    """The runs in their order, those of one sweep together under its directory, the others under themselves."""
    groups: dict[Path | Run, list[Run]] = {}
    known: dict[Path, bool] = {}
    for run in runs:
        parent = run.directory.parent
        if parent not in known:
            known[parent] = (parent / SWEEP_FILE).is_file()
        groups.setdefault(parent if known[parent] else run, []).append(run)
    return {key: tuple(found) for key, found in groups.items()}
