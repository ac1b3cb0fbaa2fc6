"""The Plan: all decided, nothing done. `--dry-run` shows the very value that `submit` sends."""

from __future__ import annotations

import json
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct

from lora_jobs.rendering.deepspeed import build_deepspeed_config
from lora_jobs.rendering.script import render_script
from lora_jobs.spec import render_spec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lora_jobs.spec import ClusterEnvironment, JobSpec

Backend = Literal["slurm", "local"]


class Plan(Struct, frozen=True):
    """One run as it will be submitted; `files` is all that is written into its directory, by relative name."""

    spec: JobSpec
    environment: ClusterEnvironment
    backend: Backend
    run_id: str
    run_directory: Path
    python: str
    script: str
    deepspeed: dict[str, Any] | None
    files: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.run_id,
            "directory": str(self.run_directory),
            "backend": self.backend,
            "environment": self.environment.name,
            "python": self.python,
            "script": self.script,
            "deepspeed": self.deepspeed,
            "files": sorted(self.files),
        }


def build_plan(
    spec: JobSpec,
    environment: ClusterEnvironment,
    *,
    backend: Backend,
    run_id: str,
    run_directory: Path,
    python: str,
    estimate: Mapping[str, Any],
    versions: Mapping[str, Any],
    exclude: Sequence[str] = (),
    more: Mapping[str, str] = MappingProxyType({}),
) -> Plan:
    """Everything that will be written (`more` files, too) and sent for one run.

    SpecError when a value can't be written safely.
    """
    script = render_script(
        spec, environment, run_id=run_id, run_directory=run_directory, python=python, exclude=exclude
    )
    deepspeed = build_deepspeed_config(spec)
    surroundings = render_surroundings(environment, backend=backend, python=python, versions=versions)
    files = {**render_files(spec, script=script, estimate=estimate, surroundings=surroundings), **more}
    return Plan(spec, environment, backend, run_id, run_directory, python, script, deepspeed, MappingProxyType(files))


def render_files(spec: JobSpec, *, script: str, estimate: Mapping[str, Any], surroundings: str) -> dict[str, str]:
    """The files of one run, by name; `surroundings` is the text of environment.json."""
    files = {
        "spec.yaml": render_spec(spec),
        "script.sbatch": script,
        "estimate.json": _render_json(estimate),
        "environment.json": surroundings,
    }
    if (deepspeed := build_deepspeed_config(spec)) is not None:
        files["deepspeed.json"] = render_deepspeed(deepspeed)
    return files


def render_surroundings(
    environment: ClusterEnvironment, *, backend: Backend, python: str, versions: Mapping[str, Any]
) -> str:
    """The text of environment.json: what the run is submitted with."""
    return _render_json(_describe_environment(environment, backend, python, versions))


def render_checkout(facts: Mapping[str, Any] | None, diff: str) -> dict[str, str]:
    """git.json, and git.diff where something is not committed; nothing without a checkout."""
    if facts is None:
        return {}
    return {"git.json": _render_json(facts), **({"git.diff": diff} if diff else {})}


def render_deepspeed(config: Mapping[str, Any]) -> str:
    """The DeepSpeed configuration as the text of deepspeed.json."""
    return _render_json(config)


def _describe_environment(
    environment: ClusterEnvironment, backend: Backend, python: str, versions: Mapping[str, Any]
) -> dict[str, Any]:
    """What the run was submitted with: enough to say later why it behaves as it does."""
    return {
        "environment": environment.name,
        "scheduler": environment.scheduler,
        "backend": backend,
        "python": python,
        "modules": list(environment.modules),
        "variables": dict(environment.environment),
        "versions": dict(versions),
    }


def _render_json(value: Mapping[str, Any]) -> str:
    return _indent(json.dumps(dict(value), ensure_ascii=False, allow_nan=False))


@lru_cache(maxsize=256)
def _indent(text: str) -> str:
    """JSON on lines of its own; the tasks of a sweep share most of theirs, and to indent is what takes time."""
    return json.dumps(json.loads(text), indent=2, ensure_ascii=False) + "\n"
