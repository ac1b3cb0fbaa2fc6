"""The plan of a sweep: one script for the array, and the files of every task's run."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from lora_jobs.rendering.plan import render_files, render_surroundings
from lora_jobs.rendering.script import render_array_script

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lora_jobs.rendering.plan import Backend
    from lora_jobs.spec import ClusterEnvironment, JobSpec, Variant


class PlannedTask(Struct, frozen=True):
    """One task of the array: its run, the swept values, and all that is written into its directory."""

    run_id: str
    values: Mapping[str, Any]
    spec: JobSpec
    files: Mapping[str, str]


class ArrayPlan(Struct, frozen=True):
    """A sweep as it will be submitted; task N is `tasks[N]`."""

    name: str
    directory: Path
    environment: ClusterEnvironment
    backend: Backend
    python: str
    script: str
    tasks: tuple[PlannedTask, ...]


def build_array_plan(
    variants: Sequence[tuple[Variant, Mapping[str, Any]]],
    environment: ClusterEnvironment,
    *,
    backend: Backend,
    name: str,
    directory: Path,
    python: str,
    versions: Mapping[str, Any],
) -> ArrayPlan:
    """The plan of these variants, each with its estimate. SpecError when a value can't be written safely."""
    first = variants[0][0].spec
    script = render_array_script(first, environment, name=name, directory=directory, python=python, tasks=len(variants))
    surroundings = render_surroundings(environment, backend=backend, python=python, versions=versions)
    tasks = []
    for number, (variant, estimate) in enumerate(variants):
        files = render_files(variant.spec, script=script, estimate=estimate, surroundings=surroundings)
        tasks.append(PlannedTask(f"{name}-{number}", variant.values, variant.spec, MappingProxyType(files)))
    return ArrayPlan(name, directory, environment, backend, python, script, tuple(tasks))
