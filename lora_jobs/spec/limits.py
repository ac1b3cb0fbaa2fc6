"""What a job asks for against what its partition has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_jobs.errors import Problem
from lora_jobs.spec.display import find_nearest
from lora_jobs.units import parse_duration, parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_jobs.spec.environment import ClusterEnvironment, Partition
    from lora_jobs.spec.job import ResourceSpec


def find_resource_problems(resources: ResourceSpec, environment: ClusterEnvironment) -> list[Problem]:
    """Everything asked for that this cluster does not have; keys are dotted, lines are not known here."""
    if environment.scheduler == "local":
        if resources.nodes == 1:
            return []
        return [Problem("resources.nodes", f"{resources.nodes} nodes on one machine: wanted 1, or a Slurm cluster")]
    name = resources.partition or environment.default_partition
    if name is None:
        return [Problem("resources.partition", f"is missing: {environment.name} has {_list_names(environment)}")]
    partition = environment.partitions.get(name)
    if partition is None:
        nearest = find_nearest(name, environment.partitions)
        meant = f"; did you mean {nearest}?" if nearest is not None else ""
        message = f"unknown partition {name!r}{meant} ({environment.name} has {_list_names(environment)})"
        return [Problem("resources.partition", message)]
    return [*_compare_node(resources, name, partition), *_compare_limits(resources, name, partition)]


def find_submission_problems(resources: ResourceSpec, environment: ClusterEnvironment) -> list[Problem]:
    """What does not hinder a check but would make a submission wrong."""
    if environment.scheduler == "local":
        return []
    found = []
    if environment.account_required and resources.account is None:
        message = f"is missing: {environment.name} accounts every job; set resources.account to your project"
        found.append(Problem("resources.account", message))
    partition = environment.find_partition(resources.partition)
    if partition is not None and resources.gpu not in {None, partition.gpu}:
        name = resources.partition or environment.default_partition
        message = f"is {resources.gpu}, but partition {name} has {partition.gpu or 'no GPU'}"
        found.append(Problem("resources.gpu", message))
    return found


def find_unused_resources(resources: ResourceSpec, environment: ClusterEnvironment) -> list[str]:
    """Warnings: what only Slurm could give is left aside on this machine."""
    if environment.scheduler != "local":
        return []
    given = [key for key in ("partition", "account", "qos", "constraint") if getattr(resources, key, None)]
    return [f"resources.{key} is not used: {environment.name} is this machine, not Slurm" for key in given]


def _list_names(environment: ClusterEnvironment) -> str:
    return ", ".join(environment.partitions) or "no partitions in its file"


def _compare_node(resources: ResourceSpec, name: str, partition: Partition) -> Iterator[Problem]:
    if partition.gpus_per_node is not None and resources.gpus_per_node > partition.gpus_per_node:
        message = f"{resources.gpus_per_node} asked, a node of {name} has {partition.gpus_per_node}"
        yield Problem("resources.gpus_per_node", message)
    cpus = resources.cpus_per_task * resources.gpus_per_node
    if partition.cpus_per_node is not None and cpus > partition.cpus_per_node:
        message = (
            f"{resources.cpus_per_task} for each of {resources.gpus_per_node} tasks are {cpus}, "
            f"a node of {name} has {partition.cpus_per_node}"
        )
        yield Problem("resources.cpus_per_task", message)
    if partition.mem_per_node and resources.mem and parse_size(resources.mem) > parse_size(partition.mem_per_node):
        yield Problem("resources.mem", f"{resources.mem} asked, a node of {name} has {partition.mem_per_node}")


def _compare_limits(resources: ResourceSpec, name: str, partition: Partition) -> Iterator[Problem]:
    """Time and nodes; a limit that the chosen qos states takes the place of the partition's."""
    limits = partition.qos.get(resources.qos) if resources.qos is not None else None
    max_time, time_of = partition.max_time, name
    max_nodes, nodes_of = partition.max_nodes, name
    if limits is not None and limits.max_time is not None:
        max_time, time_of = limits.max_time, f"qos {resources.qos}"
    if limits is not None and limits.max_nodes is not None:
        max_nodes, nodes_of = limits.max_nodes, f"qos {resources.qos}"
    if max_time is not None and parse_duration(resources.time) > parse_duration(max_time):
        yield Problem("resources.time", f"{resources.time} asked, {time_of} allows {max_time}")
    if max_nodes is not None and resources.nodes > max_nodes:
        yield Problem("resources.nodes", f"{resources.nodes} asked, {nodes_of} allows {max_nodes}")
