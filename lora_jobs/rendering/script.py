"""The batch script: every value checked and quoted here, then laid out by templates/job.sbatch.j2."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lora_jobs.rendering.quoting import (
    escape_pattern,
    quote_constraint,
    quote_log_path,
    quote_shell,
    require_folder,
    require_variable,
    require_word,
)
from lora_jobs.resources import find_resource_directory
from lora_jobs.units import GIB, MIB, format_duration, parse_duration, parse_size

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lora_jobs.spec import ClusterEnvironment, JobSpec

TEMPLATE = "job.sbatch.j2"


@cache
def _templates() -> Environment:
    """Strict: a name that the template uses and nobody gave is an error. Values arrive quoted, so no escaping."""
    return Environment(
        loader=FileSystemLoader(find_resource_directory("templates")),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701  (shell text, not HTML)
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render_script(
    spec: JobSpec,
    environment: ClusterEnvironment,
    *,
    run_id: str,
    run_directory: Path,
    python: str,
    exclude: Sequence[str] = (),
) -> str:
    """The sbatch script of one run, kept off the nodes in `exclude`.

    SpecError when a value can't be written so that it means only itself.
    """
    values = _header_values(spec, environment, run_id=run_id, run_directory=run_directory)
    if exclude:
        values["placement"] = [*values["placement"], ("exclude", ",".join(require_word(n, "node") for n in exclude))]
    values |= _body_values(environment, run_directory=run_directory, python=python)
    return _templates().get_template(TEMPLATE).render(values)


def _header_values(
    spec: JobSpec, environment: ClusterEnvironment, *, run_id: str, run_directory: Path
) -> dict[str, Any]:
    """What stands in #SBATCH lines: numbers, words and one path, in the form that sbatch reads."""
    asked = spec.resources
    limit = parse_duration(asked.time)
    folder = require_folder(str(run_directory), "run directory")
    return {
        "run_id": require_word(run_id, "run id"),
        "nodes": asked.nodes,
        "gpus_per_node": asked.gpus_per_node,
        "cpus_per_task": asked.cpus_per_task,
        "gpu_option": environment.gpu_option,
        "mem": None if asked.mem is None else _render_mem(asked.mem),
        "time": format_duration(limit),
        "placement": _placement(spec, environment),
        # A signal that is due before the job has run for half its time would stop every attempt at its start.
        "signal_seconds": min(spec.resume.signal_seconds, limit // 2),
        "requeue_option": "requeue" if spec.resume.auto else "no-requeue",
        "batch_log": quote_log_path(f"{escape_pattern(folder)}/logs/slurm-%j.out", "run directory"),
    }


def _placement(spec: JobSpec, environment: ClusterEnvironment) -> list[tuple[str, str]]:
    """Where the job may run, as (sbatch option, value); only what was asked."""
    asked = spec.resources
    words = {
        "partition": asked.partition or environment.default_partition,
        "account": asked.account,
        "qos": asked.qos,
        "reservation": asked.reservation,
    }
    lines = [(option, require_word(value, f"resources.{option}")) for option, value in words.items() if value]
    if asked.constraint is not None:
        lines.append(("constraint", quote_constraint(asked.constraint, "resources.constraint")))
    return lines


def _body_values(environment: ClusterEnvironment, *, run_directory: Path, python: str) -> dict[str, Any]:
    """What stands in lines that bash runs: every one of these is one quoted word."""
    folder = str(run_directory)
    where = f"{environment.name}: environment"
    exports = [
        (require_variable(name, where), quote_shell(value, f"{where}.{name}"))
        for name, value in environment.environment.items()
    ]
    return {
        "environment_name": require_word(environment.name, "environment name"),
        "modules": [quote_shell(module, f"{environment.name}: modules") for module in environment.modules],
        "exports": exports,
        "run": quote_shell(folder, "run directory"),
        "logs": quote_shell(f"{escape_pattern(folder)}/logs", "run directory"),
        "python": quote_shell(python, f"{environment.name}: python"),
    }


def _render_mem(size: str) -> str:
    """sbatch takes whole numbers only: 1.5G becomes 1536M."""
    number = parse_size(size)
    return f"{number // GIB}G" if number % GIB == 0 else f"{-(-number // MIB)}M"
