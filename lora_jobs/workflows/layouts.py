"""The sensible ways to spread one job: partitions, QOS, nodes and GPUs that leave the training itself unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import Struct

from lora_jobs.units import GIB, parse_duration, parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lora_jobs.spec import ClusterEnvironment, JobSpec, Partition

MOST_NODES = 4
"""More nodes than these are not proposed: a LoRA step is small, and the batch would have to grow."""


class Layout(Struct, frozen=True):
    """A row's name and the settings that differ from the spec. The name says all: it means the same tomorrow."""

    name: str
    partition: str | None
    settings: Mapping[str, Any]
    only_if_whole: bool = False
    """A QOS nobody asked for is proposed only where the whole run fits into its time."""


def list_layouts(spec: JobSpec, environment: ClusterEnvironment) -> tuple[list[Layout], list[str]]:
    """Every layout in which the batch of a step stays the one of the spec, and what was left out."""
    if environment.scheduler == "local":
        return _list_local(spec), []
    layouts, notes = [], []
    for name, partition in environment.partitions.items():
        if partition.gpus_per_node is None:
            notes.append(f"{name}: {environment.name} names no GPUs for it, left out")
            continue
        for qos in _list_qos(spec, partition):
            layouts += [
                _build_layout(spec, name, partition, qos, nodes, gpus)
                for nodes, gpus in _list_sizes(spec, partition, qos)
            ]
    if not environment.partitions:
        notes.append(f"{environment.name} names no partitions: `lora-jobs clusters init` writes them")
    return layouts, notes


def _list_local(spec: JobSpec) -> list[Layout]:
    sizes = sorted({1, spec.resources.gpus_per_node})
    return [
        Layout(f"local:1x{gpus}", None, {"resources.nodes": 1, "resources.gpus_per_node": gpus, **batch})
        for gpus in sizes
        if (batch := split_batch(spec, gpus)) is not None
    ]


def _list_qos(spec: JobSpec, partition: Partition) -> list[str | None]:
    return [spec.resources.qos] if spec.resources.qos is not None else [None, *partition.qos]


def _list_sizes(spec: JobSpec, partition: Partition, qos: str | None) -> Iterator[tuple[int, int]]:
    """Powers of two within a node, whole nodes beyond it, and what the spec itself asks for."""
    full = partition.gpus_per_node or 1
    within = {1 << power for power in range(full.bit_length()) if 1 << power <= full} | {full}
    limits = partition.qos.get(qos) if qos is not None else None
    allowed = (limits.max_nodes if limits else None) or partition.max_nodes or MOST_NODES
    sizes = {(1, gpus) for gpus in within} | {(nodes, full) for nodes in (2, MOST_NODES) if nodes <= allowed}
    own = (spec.resources.nodes, spec.resources.gpus_per_node)
    if own[0] <= allowed and own[1] <= full:
        sizes.add(own)
    yield from sorted(size for size in sizes if split_batch(spec, size[0] * size[1]) is not None)


def split_batch(spec: JobSpec, world: int) -> dict[str, int] | None:
    """Micro-batch and accumulation for so many GPUs with the spec's batch per step; None where it does not divide.

    The micro-batch never grows, so that what fits stays what `check` says.
    """
    training = spec.training
    micro = training.per_device_train_batch_size
    total = micro * training.gradient_accumulation_steps * spec.resources.world_size
    if total % world:
        return None
    each = total // world
    batch = next(size for size in range(min(micro, each), 0, -1) if each % size == 0)
    return {"training.per_device_train_batch_size": batch, "training.gradient_accumulation_steps": each // batch}


def _build_layout(spec: JobSpec, name: str, partition: Partition, qos: str | None, nodes: int, gpus: int) -> Layout:
    asked = spec.resources
    settings: dict[str, Any] = {
        "resources.partition": name,
        "resources.nodes": nodes,
        "resources.gpus_per_node": gpus,
        "resources.time": _shorten_time(asked.time, partition, qos),
        **(split_batch(spec, nodes * gpus) or {}),
    }
    if asked.gpu is not None and partition.gpu is not None:
        settings["resources.gpu"] = partition.gpu
    if partition.cpus_per_node is not None and asked.cpus_per_task * gpus > partition.cpus_per_node:
        settings["resources.cpus_per_task"] = max(1, partition.cpus_per_node // gpus)
    if asked.mem is not None:
        settings["resources.mem"] = _scale_memory(asked.mem, gpus / asked.gpus_per_node, partition)
    if qos != asked.qos:
        settings["resources.qos"] = qos
    label = name if qos is None else f"{name}/{qos}"
    return Layout(f"{label}:{nodes}x{gpus}", name, settings, only_if_whole=qos != asked.qos)


def _shorten_time(time: str, partition: Partition, qos: str | None) -> str:
    """The spec's time, or the limit where that is shorter."""
    limits = partition.qos.get(qos) if qos is not None else None
    limit = (limits.max_time if limits else None) or partition.max_time
    return time if limit is None or parse_duration(time) <= parse_duration(limit) else limit


def _scale_memory(mem: str, factor: float, partition: Partition) -> str:
    """Host memory goes with the processes of a node, up to what the node has."""
    wanted = parse_size(mem) if factor == 1 else -(-int(parse_size(mem) * factor) // GIB) * GIB
    if partition.mem_per_node is not None and wanted > parse_size(partition.mem_per_node):
        return partition.mem_per_node
    return mem if factor == 1 else f"{wanted // GIB}G"
