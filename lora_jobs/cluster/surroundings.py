"""What else this machine offers a run: disk space, quota, and the packages of another interpreter."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from typing import TYPE_CHECKING

from msgspec import Struct

from lora_jobs.cluster.commands import find_command, run_command
from lora_jobs.errors import ClusterError, CommandError, OutputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

QUERY_SECONDS = 30.0
KIB = 1024

# Runs in the job's interpreter: it reads metadata and finds files, and imports none of the packages.
_PROBE = """
import importlib.metadata as metadata, importlib.util, json, pathlib, platform, re, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        found[name] = None
cuda = None
try:
    spec = importlib.util.find_spec("torch")
    text = (pathlib.Path(spec.origin).parent / "version.py").read_text()
    match = re.search(r"^cuda[^=]*= *['\\"]([^'\\"]+)", text, re.M)
    cuda = match and match[1]
except Exception:
    pass
print(json.dumps({"python": platform.python_version(), "prefix": sys.prefix, "cuda": cuda, "packages": found}))
"""


class Interpreter(Struct, frozen=True):
    """A Python and the versions it would import; None where a package is not installed."""

    path: str
    python: str
    prefix: str
    cuda: str | None
    """The CUDA that torch was built with; None for a CPU build, or without torch."""
    packages: dict[str, str | None]


class Disk(Struct, frozen=True):
    """The file system that a directory is on, in bytes."""

    directory: Path
    total_bytes: int
    free_bytes: int
    writable: bool


class Quota(Struct, frozen=True):
    """My usage of one file system, in bytes and files; None where there is no limit."""

    filesystem: str
    used_bytes: int
    limit_bytes: int | None
    files: int | None
    files_limit: int | None


def read_interpreter(python: str, packages: Sequence[str]) -> Interpreter:
    """Ask an interpreter for its packages' versions; none of them is imported. Errors: ClusterError."""
    # -I would hide PYTHONPATH and the user's site, which the job will see.
    answer = run_command([python, "-c", _PROBE, *packages], timeout=QUERY_SECONDS)
    line = (answer.stdout.strip().splitlines() or [""])[-1]
    if answer.returncode != 0:
        said = (answer.stderr.strip().splitlines() or [f"status {answer.returncode}"])[-1]
        raise CommandError(f"{python} can't be asked for its packages: {said[:200]}", command=answer.argv)
    try:
        values = json.loads(line)
        return Interpreter(python, values["python"], values["prefix"], values["cuda"], values["packages"])
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{python} answered something else than versions: {line[:200]!r}", line=line) from error


def read_disk(directory: Path) -> Disk:
    """The nearest directory that is there, and its file system. Errors: OSError."""
    there = directory.absolute()
    while not there.exists():
        there = there.parent
    usage = shutil.disk_usage(there)
    return Disk(there, usage.total, usage.free, os.access(there, os.W_OK | os.X_OK))


def find_filesystem(directory: Path) -> str | None:
    """The type of the file system, such as lustre, nfs4 or ext4."""
    import psutil  # a check of the free space starts without it

    with contextlib.suppress(OSError):
        place = str(directory.resolve())
        mounts = [mount for mount in psutil.disk_partitions(all=True) if _is_within(place, mount.mountpoint)]
        if mounts:
            return str(max(mounts, key=lambda mount: len(mount.mountpoint)).fstype)
    return None


def _is_within(place: str, mountpoint: str) -> bool:
    return place == mountpoint or place.startswith(mountpoint.rstrip("/") + "/")


def read_quota(directory: Path, filesystem: str | None, user: str) -> tuple[list[Quota], str | None]:
    """My quotas, and why there are none to be read. Lustre has a program of its own."""
    if filesystem == "lustre" and find_command("lfs") is not None:
        argv, parse = ["lfs", "quota", "-q", "-u", user, str(directory)], parse_lfs_quota
    elif find_command("quota") is not None:
        argv, parse = ["quota", "-w", "-p", "-v"], parse_quota
    else:
        return [], "no quota program here"
    try:
        answer = run_command(argv, timeout=QUERY_SECONDS)
    except ClusterError as error:
        return [], error.message
    # quota ends with 1 for a user who is over it, and still lists it.
    found = parse(answer.stdout)
    said = (answer.stderr.strip().splitlines() or [""])[0][:200]
    return found, None if found else said or f"{argv[0]} names no limit"


def parse_quota(text: str) -> list[Quota]:
    """Rows of `quota -w -p -v`: filesystem, KiB used (starred when over), soft, hard, grace, files, the same."""
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 9 and words[1].rstrip("*").isdecimal():
            found.append(_build_quota(words[0], words[1], words[2:4], words[5], words[6:8]))
    return found


def parse_lfs_quota(text: str) -> list[Quota]:
    """Rows of `lfs quota -q`; a long name stands on a line of its own."""
    words = text.split()
    if len(words) < 8 or not words[1].rstrip("*").isdecimal():
        return []
    return [_build_quota(words[0], words[1], words[2:4], words[5], words[6:8])]


def _build_quota(name: str, used: str, limits: Sequence[str], files: str, file_limits: Sequence[str]) -> Quota:
    def lowest(values: Sequence[str]) -> int | None:
        numbers = [int(value) for value in values if value.isdecimal() and int(value)]
        return min(numbers, default=None)

    limit = lowest(limits)
    count = files.rstrip("*")
    return Quota(
        filesystem=name,
        used_bytes=int(used.rstrip("*")) * KIB,
        limit_bytes=None if limit is None else limit * KIB,
        files=int(count) if count.isdecimal() else None,
        files_limit=lowest(file_limits),
    )


def list_cached_models(hub: Path) -> list[str]:
    """Model ids in a Hugging Face cache: its directories are models--ORGANISATION--NAME."""
    return sorted(
        path.parent.name.removeprefix("models--").replace("--", "/")
        for path in hub.glob("models--*/snapshots")
        if next(path.iterdir(), None) is not None
    )


def read_variables(names: Sequence[str]) -> dict[str, str]:
    """Variables of this shell, which sbatch passes on; only those that are set."""
    return {name: os.environ[name] for name in names if name in os.environ}
