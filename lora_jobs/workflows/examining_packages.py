"""The lines of a diagnosis about the job's interpreter: what it holds, and what of it has a known hole."""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, requires
from typing import TYPE_CHECKING

from msgspec import Struct

from lora_jobs import __version__
from lora_jobs.cluster.surroundings import Interpreter, read_interpreter
from lora_jobs.errors import LoraJobsError
from lora_jobs.workflows.findings import Finding, split_version

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_jobs.spec import ClusterEnvironment

EXTRAS = ("bitsandbytes", "flash-attn")


class Hole(Struct, frozen=True):
    """A version below which a package has a known hole."""

    package: str
    fixed: str
    name: str
    what: str


HOLES = (
    Hole("torch", "2.6", "CVE-2025-32434", "torch.load runs code from a file even with weights_only"),
    Hole("torch", "2.10", "CVE-2026-24747", "torch.load with weights_only corrupts memory on a crafted checkpoint"),
)


def look_at_packages(environment: ClusterEnvironment | None) -> Iterator[Finding]:
    """The job's interpreter: it may be another than this one."""
    area = "job environment"
    python = (environment.python if environment else None) or sys.executable
    wanted = list_requirements()
    try:
        found = read_interpreter(python, ["lora-jobs", "submitit", *wanted, *EXTRAS])
    except LoraJobsError as error:
        hint = f"correct python: in {environment.file}" if environment and environment.python else "install it anew"
        yield Finding(area, "python", "wrong", error.message, hint)
        return
    whose = f"of {environment.file}" if environment and environment.python else "the one that runs lora-jobs"
    yield Finding(area, "python", "ok", f"{found.python}, {python} ({whose})")
    where = f"{python} -m pip install 'lora-jobs[train]' -c envs/constraints.txt"
    ours = found.packages.get("lora-jobs")
    if ours != __version__:
        message = f"{ours or 'not installed'}; here {__version__}: the job would not read what is submitted"
        yield Finding(area, "lora-jobs", "wrong", message, f"{python} -m pip install lora-jobs=={__version__}")
    missing = [name for name in wanted if found.packages.get(name) is None]
    if missing:
        yield Finding(area, "training packages", "wrong", f"not installed: {', '.join(missing)}", where)
    for name, (operator, version) in wanted.items():
        if name not in missing:
            yield _look_at_package(area, name, operator, version, found, where)
    yield from _look_at_extras(area, found)


def _look_at_package(area: str, name: str, operator: str, version: str, found: Interpreter, where: str) -> Finding:
    installed = found.packages[name] or ""
    numbers = split_version(installed)
    hole = next((hole for hole in HOLES if hole.package == name and numbers < split_version(hole.fixed)), None)
    if hole is not None:
        return Finding(area, name, "wrong", f"{installed}: {hole.name}, {hole.what}; fixed in {hole.fixed}", where)
    wrong = installed != version if operator == "==" else numbers < split_version(version)
    if wrong:
        return Finding(area, name, "wrong", f"{installed}; wanted {operator}{version}", where)
    if name == "torch":
        if found.cuda is None:
            return Finding(
                area, name, "warning", f"{installed}, built without CUDA: it trains on the CPU only",
                "on a cluster with GPUs install PyPI's torch, without an index for CPUs",
            )  # fmt: skip
        return Finding(area, name, "ok", f"{installed}, CUDA {found.cuda}")
    return Finding(area, name, "ok", installed)


def _look_at_extras(area: str, found: Interpreter) -> Iterator[Finding]:
    packages = found.packages
    if version := packages.get("bitsandbytes"):
        old = split_version(version) < (0, 50)
        yield Finding(
            area, "bitsandbytes", "warning" if old else "ok", version + ("; this is tested with 0.50" if old else ""),
            f"{found.path} -m pip install -U bitsandbytes" if old else None,
        )  # fmt: skip
    else:
        yield Finding(
            area, "bitsandbytes", "warning", "not installed: no 4-bit or 8-bit models, no 8-bit Adam",
            f"{found.path} -m pip install 'lora-jobs[quantization]'",
        )  # fmt: skip
    if version := packages.get("flash-attn"):
        yield Finding(area, "flash-attn", "ok", version)
    else:
        yield Finding(area, "flash-attn", "ok", "not installed: attn_implementation sdpa or eager, which need nothing")


def list_requirements() -> dict[str, tuple[str, str]]:
    """What the job's environment needs, from this package's own metadata: name -> (operator, version)."""
    try:
        lines = requires("lora-jobs") or []
    except PackageNotFoundError:
        return {}
    found = {}
    for line in lines:
        match = re.match(r"(?P<name>[A-Za-z0-9._-]+)\s*(?P<operator>>=|==)\s*(?P<version>[0-9][^;,\s]*)", line)
        if match and re.search(r"extra\s*==\s*['\"]train['\"]", line):
            found[match["name"]] = (match["operator"], match["version"])
    return found
