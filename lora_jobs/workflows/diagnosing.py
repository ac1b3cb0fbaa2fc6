"""What this machine and its cluster offer, line by line: ok, a warning, or wrong, each with the next step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from lora_jobs.cluster.commands import find_command
from lora_jobs.cluster.inventory import Inventory, find_user, read_inventory
from lora_jobs.cluster.surroundings import find_filesystem, list_cached_models, read_disk, read_quota, read_variables
from lora_jobs.errors import LoraJobsError, SpecError
from lora_jobs.runs import find_runs_root
from lora_jobs.spec import ClusterEnvironment, list_environments, load_environment
from lora_jobs.spec.hub import find_cache
from lora_jobs.units import GIB, format_count, format_gib
from lora_jobs.workflows.examining_packages import look_at_packages
from lora_jobs.workflows.examining_slurm import look_at_accounts, look_at_partitions, look_at_slurm
from lora_jobs.workflows.fetching import OFFLINE_SWITCHES
from lora_jobs.workflows.findings import Finding, Level

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FREE_WARNING, FREE_WRONG = 50 * GIB, 5 * GIB
"""Free space below which a few checkpoints, or one, no longer fit beside a downloaded model."""

QUOTA_WARNING = 0.9


class Diagnosis(Struct, frozen=True):
    """Every finding, in the order of the areas."""

    findings: tuple[Finding, ...]

    @property
    def worst(self) -> Level:
        levels = {finding.level for finding in self.findings}
        return "wrong" if "wrong" in levels else "warning" if "warning" in levels else "ok"

    def to_json(self) -> dict[str, Any]:
        return {"worst": self.worst, "findings": [finding.to_json() for finding in self.findings]}


def diagnose(cluster: str | None = None) -> Diagnosis:
    """Look at Slurm, the environment file, the disk, the job's packages and the Hugging Face cache. Never raises for
    what it finds; SpecError only for a `cluster` that is not there.
    """
    inventory = read_inventory(find_user()) if find_command("sbatch") or find_command("sinfo") else None
    named = load_environment(cluster) if cluster is not None else None
    environment, trouble = (named, []) if named else _find_environment(inventory)
    areas: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("slurm", lambda: look_at_slurm(inventory)),
        ("partitions", lambda: look_at_partitions(inventory, environment)),
        ("accounts", lambda: look_at_accounts(inventory, environment)),
        ("disk", _look_at_disk),
        ("job environment", lambda: look_at_packages(environment)),
        ("compiler", _look_at_compilers),
        ("hugging face", lambda: _look_at_hub(environment)),
    ]
    findings = list(trouble)
    for area, look in areas:
        try:
            findings += look()
        except (LoraJobsError, OSError) as error:
            hint = (error.hint if isinstance(error, LoraJobsError) else None) or "mend that, then look again"
            findings.append(Finding(area, area, "warning", f"not readable: {error}", hint))
    return Diagnosis(tuple(findings))


def _find_environment(inventory: Inventory | None) -> tuple[ClusterEnvironment | None, list[Finding]]:
    """The environment file of this cluster: by its name, else the one that shares most partitions; else local."""
    try:
        environments, errors = list_environments()
    except LoraJobsError as error:
        return None, [Finding("partitions", "envs", "wrong", error.message, error.hint or "correct the folder")]
    broken = [_describe_broken(error) for error in errors]
    if inventory is None or not inventory.list_partitions():
        return next((found for found in environments if found.scheduler == "local"), None), broken
    here = set(inventory.list_partitions())
    ranked = sorted(
        (found for found in environments if found.scheduler == "slurm" and here & set(found.partitions)),
        key=lambda found: (found.name == inventory.cluster, len(here & set(found.partitions))),
    )
    return (ranked[-1] if ranked else None), broken


def _describe_broken(error: SpecError) -> Finding:
    first = next(iter(error.problems), None)
    detail = f"{error.message}: {first.message}" if first else error.message
    return Finding("partitions", "envs", "wrong", detail, "correct the file, or move it away")


def _look_at_disk() -> Iterator[Finding]:
    root = find_runs_root()
    disk = read_disk(root)
    filesystem = find_filesystem(disk.directory)
    kind = f" ({filesystem})" if filesystem else ""
    message = f"{root}: {format_gib(disk.free_bytes)} free of {format_gib(disk.total_bytes)}{kind}"
    advice = "set LORA_JOBS_HOME to a directory on the work or scratch file system"
    if not disk.writable:
        yield Finding("disk", "runs", "wrong", f"{disk.directory} can't be written to", advice)
    elif disk.free_bytes < FREE_WRONG:
        yield Finding("disk", "runs", "wrong", message, advice)
    elif disk.free_bytes < FREE_WARNING or filesystem == "tmpfs":
        yield Finding("disk", "runs", "warning", message, advice)
    else:
        yield Finding("disk", "runs", "ok", message)
    quotas, why = read_quota(disk.directory, filesystem, find_user())
    if not quotas:
        yield Finding("disk", "quota", "ok", f"none known: {why}")
    for quota in quotas:
        parts = [f"{quota.filesystem}: {format_gib(quota.used_bytes)} used"]
        parts += [f"of {format_gib(quota.limit_bytes)}"] if quota.limit_bytes else []
        parts += (
            [f"{format_count(quota.files)} of {format_count(quota.files_limit)} files"]
            if quota.files_limit and quota.files
            else []
        )
        part = max(
            quota.used_bytes / quota.limit_bytes if quota.limit_bytes else 0.0,
            (quota.files or 0) / quota.files_limit if quota.files_limit else 0.0,
        )
        level: Level = "wrong" if part >= 1 else "warning" if part >= QUOTA_WARNING else "ok"
        yield Finding("disk", "quota", level, " ".join(parts), None if level == "ok" else f"make room, or {advice}")


def _look_at_compilers() -> Iterator[Finding]:
    """Triton (TRL's fused loss on a GPU) and DeepSpeed compile small things on the node."""
    found = next((path for name in ("cc", "gcc", "clang") if (path := find_command(name))), None)
    if found:
        yield Finding("compiler", "C compiler", "ok", f"{found} (here; compute nodes may differ)")
    else:
        yield Finding(
            "compiler", "C compiler", "warning", "none on PATH: Triton compiles its kernels with one, on the GPU node",
            "add a module such as gcc to modules: in the environment file",
        )  # fmt: skip
    cuda = os.environ.get("CUDA_HOME") or find_command("nvcc")
    if cuda:
        yield Finding("compiler", "CUDA toolkit", "ok", cuda)
    else:
        yield Finding(
            "compiler", "CUDA toolkit", "ok", "none here: only DeepSpeed's own kernels need it (offload_optimizer)"
        )


def _look_at_hub(environment: ClusterEnvironment | None) -> Iterator[Finding]:
    area = "hugging face"
    variables = {
        **read_variables(("HF_HOME", "HF_HUB_CACHE", *OFFLINE_SWITCHES)),
        **(environment.environment if environment else {}),
    }
    home = Path(variables.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    hub = find_cache(variables)
    models = list_cached_models(hub)
    disk = read_disk(hub)
    shown = f"{len(models)} models" if len(models) != 1 else "1 model"
    message = f"{hub}: {shown}, {format_gib(disk.free_bytes)} free"
    level: Level = "warning" if disk.free_bytes < FREE_WARNING else "ok"
    yield Finding(area, "cache", level, message, "set HF_HOME to a roomier directory" if level == "warning" else None)
    on = [name for name in OFFLINE_SWITCHES if str(variables.get(name, "")).upper() in {"1", "ON", "YES", "TRUE"}]
    if on and not models:
        yield Finding(
            area, "offline", "warning", f"{', '.join(on)} set, and the cache is empty",
            "on a login node: lora-jobs fetch SPEC, or give a local directory as model.name_or_path",
        )  # fmt: skip
    elif on:
        yield Finding(area, "offline", "ok", f"{', '.join(on)} set; cached: {', '.join(models[:5])}")
    elif environment is not None and environment.scheduler == "slurm":
        yield Finding(
            area, "offline", "warning", "compute nodes may ask the hub: the offline switches are not set",
            f'where nodes have no internet set HF_HUB_OFFLINE: "1" under environment: in {environment.file}',
        )  # fmt: skip
    else:
        yield Finding(area, "offline", "ok", "not set: models are fetched when they are needed")
    known = any(name in os.environ for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")) or (home / "token").exists()
    yield Finding(
        area, "token", "ok", "there" if known else "none: gated models (Gemma, Llama) need one: `hf auth login`"
    )
