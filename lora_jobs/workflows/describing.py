"""A first envs/NAME.yaml from what Slurm says of its cluster."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from lora_jobs.cluster.inventory import Inventory, NodeGroup, PartitionRules, Qos, find_user, read_inventory
from lora_jobs.errors import ClusterError, SpecError
from lora_jobs.runs import write_atomic
from lora_jobs.sizing import GPUS, Gpu, find_gpu
from lora_jobs.spec import ClusterEnvironment, parse_environment
from lora_jobs.units import format_duration

if TYPE_CHECKING:
    from collections.abc import Iterator

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+@-]{0,127}")


def init_cluster(name: str, directory: Path | None = None) -> tuple[Path, ClusterEnvironment, tuple[str, ...]]:
    """Write envs/NAME.yaml of the cluster that this machine belongs to; the file, its value, and what to look at.

    Errors: SpecError when the file exists or the name is unusable, ClusterError when Slurm can't be read.
    """
    named = os.environ.get("LORA_JOBS_ENVS")
    folder = directory or (Path(named).expanduser() if named else Path("envs"))
    path = folder / f"{name}.yaml"
    if path.exists():
        raise SpecError(f"{path} exists already", hint="choose another name: nothing was changed")
    inventory = read_inventory(find_user())
    if not inventory.list_partitions():
        said = "; ".join(inventory.notes) or "sinfo lists no partition"
        raise ClusterError(f"this cluster can't be read: {said}", hint="run it on a login node of the cluster")
    text, remarks = render_environment(name, inventory)
    environment = parse_environment(text, name=name, file=str(path))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
    except OSError as error:
        raise SpecError(f"can't write {path}: {error.strerror}", hint="cd to where you may write") from error
    return path, environment, remarks


def render_environment(name: str, inventory: Inventory) -> tuple[str, tuple[str, ...]]:
    """The YAML text, and remarks on what a person has to look at."""
    remarks: list[str] = [*inventory.notes]
    usable = [partition for partition in inventory.list_partitions() if _WORD.fullmatch(partition)]
    default = next((rule.name for rule in inventory.partitions if rule.default and rule.name in usable), None)
    enforced = "associations" in inventory.config.get("AccountingStorageEnforce", "")
    accounts = sorted({association.account for association in inventory.associations})
    old_select = inventory.config.get("SelectType", "select/cons_tres") != "select/cons_tres"
    version = inventory.version or "of an unknown version"
    lines = [
        f"# {inventory.cluster or name}, written by `lora-jobs clusters init {name}` from what Slurm says.",
        "# Look at every line that says CHECK; then: lora-jobs check SPEC --set resources.cluster=" + name,
        "",
        f"source: {json.dumps(f'Slurm {version} on {inventory.cluster or name}')}",
        "scheduler: slurm",
        f"account_required: {'true' if enforced else 'false'}"
        + (f" # yours: {', '.join(accounts)}" if accounts else ""),
        *([f"default_partition: {default}"] if default else []),
        f"gpu_option: {'gres' if old_select else 'gpus-per-node'}",
        "",
        "partitions:",
    ]
    for partition in usable:
        lines += _render_partition(partition, inventory, remarks)
    lines += [
        "",
        "# `module load` in the script, in this order, such as [cuda, python/3.11]. CHECK: `module avail`",
        "modules: []",
        "# The interpreter of the environment that holds the training packages; left out: the one that runs lora-jobs.",
        "# python: /path/to/venv/bin/python",
        "# CHECK: where compute nodes have no internet, set these and fetch models on a login node first.",
        "environment: {}",
        '#  HF_HUB_OFFLINE: "1"',
        '#  TRANSFORMERS_OFFLINE: "1"',
        '#  HF_DATASETS_OFFLINE: "1"',
    ]
    return "\n".join(lines) + "\n", tuple(remarks)


def _render_partition(partition: str, inventory: Inventory, remarks: list[str]) -> Iterator[str]:
    groups = inventory.find_groups(partition)
    rule = next((rule for rule in inventory.partitions if rule.name == partition), None)
    yield f"  {partition}:"
    body = [*_render_nodes(partition, groups, remarks), *_render_limits(rule, groups), *_render_qos(rule, inventory)]
    yield from body or ["    max_nodes: 1 # CHECK: Slurm says nothing of this partition"]


def _render_nodes(partition: str, groups: tuple[NodeGroup, ...], remarks: list[str]) -> Iterator[str]:
    """The kind of node that the partition has most of, GPU nodes before others."""
    kinds: Counter[tuple[str | None, int]] = Counter()
    for group in groups:
        for gres in group.gpus or ():
            kinds[gres.type, gres.count] += group.nodes
    if kinds:
        (slurm_type, count), _ = kinds.most_common(1)[0]
        alike = tuple(group for group in groups if any((g.type, g.count) == (slurm_type, count) for g in group.gpus))
        features = [feature for group in alike for feature in group.features]
        gpu, remark = choose_gpu(slurm_type, features)
        if remark:
            remarks.append(f"{partition}: {remark}")
        comment = f" # CHECK: {remark}" if remark else ""
        yield f"    gpu: {gpu.name}{comment}" if gpu else f"    # gpu: NAME{comment}"
        yield f"    gpus_per_node: {count}"
        if len(kinds) > 1:
            others = ", ".join(f"{count} x {kind or 'gpu'}" for kind, count in list(kinds)[1:])
            remarks.append(f"{partition}: nodes differ; also {others}: choose with resources.constraint")
            yield f"    # nodes differ; also {others}: choose with resources.constraint"
    else:
        alike = groups
    cpus = [group.cpus for group in alike if group.cpus]
    memory = [group.memory_mb for group in alike if group.memory_mb]
    if cpus:
        yield f"    cpus_per_node: {min(cpus)}"
    if memory:
        yield f"    mem_per_node: {min(memory)}M"


def _render_limits(rule: PartitionRules | None, groups: tuple[NodeGroup, ...]) -> Iterator[str]:
    limits = [group.limit_seconds for group in groups if group.limit_seconds]
    limit = rule.limit_seconds if rule else (min(limits) if limits else None)
    nodes = sum(group.nodes for group in groups)
    most = min(number for number in (rule.max_nodes if rule else None, nodes or None, 2**31 - 1) if number is not None)
    if limit:
        yield f'    max_time: "{format_duration(limit)}"'
    if most < 2**31 - 1:
        yield f"    max_nodes: {most}"


def _render_qos(rule: PartitionRules | None, inventory: Inventory) -> Iterator[str]:
    """The QOS that I may use here and that set a limit of their own."""
    mine = {name for association in inventory.associations for name in association.qos}
    rows = [
        f"      {qos.name}: {{ {limits} }}"
        for qos in inventory.qos
        if qos.name in mine
        and _WORD.fullmatch(qos.name)
        and (rule is None or rule.qos is None or qos.name in rule.qos)
        and (limits := _render_qos_limits(qos))
    ]
    if rows:
        yield "    qos:"
        yield from rows


def _render_qos_limits(qos: Qos) -> str:
    limits = []
    if qos.limit_seconds:
        limits.append(f'max_time: "{format_duration(qos.limit_seconds)}"')
    if qos.max_nodes:
        limits.append(f"max_nodes: {qos.max_nodes}")
    return ", ".join(limits)


def choose_gpu(slurm_type: str | None, features: list[str]) -> tuple[Gpu | None, str | None]:
    """The GPU of the table that Slurm's type word, or a feature, means; and a remark where that is not sure.

    "a100" comes with 40, 64 and 80 GB: a number in a feature decides, else the smallest is taken, which is safe.
    """
    for word in [slurm_type, *features]:
        if not word:
            continue
        family = [gpu for gpu in GPUS if _letters(gpu.name.partition("-")[0]) == _letters(word)]
        if len(family) == 1:
            return family[0], None if word == slurm_type else f"from the feature {word}"
        if family:
            return _choose_size(family, word, features)
        try:
            return find_gpu(word), None if word == slurm_type else f"from the feature {word}"
        except SpecError:
            continue
    said = f"Slurm says {slurm_type!r}" if slurm_type else "Slurm names no type"
    return None, f"{said}: set it to a name that `lora-jobs gpus` lists (`nvidia-smi` on a node says which)"


def _choose_size(family: list[Gpu], word: str, features: list[str]) -> tuple[Gpu, str | None]:
    sizes = {gpu.name.partition("-")[2]: gpu for gpu in family}
    numbers = [number for feature in features for number in re.findall(r"\d+", feature)]
    if (size := next((number for number in numbers if number in sizes), None)) is not None:
        return sizes[size], None
    smallest = min(family, key=lambda gpu: gpu.usable_bytes)
    names = ", ".join(gpu.name for gpu in family)
    return smallest, f"Slurm says {word}, which is one of {names}; the smallest is assumed"


def _letters(text: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", text.lower())
