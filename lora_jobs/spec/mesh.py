"""JAX's notation for a device mesh, [[sizes], [axes]], as processes and ZeRO stages."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, TypeGuard

from lora_jobs.spec.section import Conflict

if TYPE_CHECKING:
    from collections.abc import Sequence

    Mesh = Sequence[Sequence[Any]]

NO_TENSOR_PARALLEL = (
    "its axis tp splits single layers over GPUs: PEFT's adapters fail in those that are split by their input (o_proj, "
    "down_proj; peft 0.21 and transformers 5.23), and the Trainer saves the optimizer state of one rank only, so that "
    "no checkpoint would resume: give tp size 1 and the GPUs to fsdp or dp"
)


def find_mesh_faults(mesh: Mesh, nodes: int, gpus_per_node: int) -> list[Conflict]:
    """What is wrong with a mesh by itself, and against the GPUs that are asked for."""
    sizes, axes = mesh
    key = "mesh_shape"
    if len(sizes) != len(axes):
        return [Conflict((key,), f"has {len(sizes)} sizes and {len(axes)} axes: wanted one size for each")]
    if len(set(axes)) != len(axes):
        return [Conflict((key,), f"names an axis twice: {', '.join(axes)}")]
    if dict(zip(axes, sizes, strict=True)).get("tp", 1) > 1:
        return [Conflict((key,), NO_TENSOR_PARALLEL)]
    if (devices := prod(sizes)) != nodes * gpus_per_node:
        shown = " x ".join(str(size) for size in sizes)
        message = (
            f"is {shown} = {devices} devices, but nodes x gpus_per_node is {nodes} x {gpus_per_node} = "
            f"{nodes * gpus_per_node}: make them agree, or leave gpus_per_node out"
        )
        return [Conflict((key, "nodes", "gpus_per_node"), message)]
    return []


def shards_weights(mesh: Mesh) -> bool:
    """Whether an axis splits the weights over more than one device."""
    return any(axis == "fsdp" and size > 1 for size, axis in zip(*mesh, strict=False))


def fill_from_mesh(values: Any) -> Any:
    """Plain values of a spec with gpus_per_node and deepspeed where a mesh says them and the spec does not.

    Values of the wrong kind stay as they are: their own checks have the better words.
    """
    resources = values.get("resources") if isinstance(values, dict) else None
    if not isinstance(resources, dict) or not _is_mesh(mesh := resources.get("mesh_shape")):
        return values
    filled = {**values}
    nodes = resources.get("nodes", 1)
    devices = prod(mesh[0])
    if "gpus_per_node" not in resources and isinstance(nodes, int) and nodes > 0 and devices % nodes == 0:
        filled["resources"] = {**resources, "gpus_per_node": devices // nodes}
    if "deepspeed" not in values and shards_weights(mesh):
        filled["deepspeed"] = {"zero_stage": 3}
    return filled


def _is_mesh(mesh: Any) -> TypeGuard[Mesh]:
    kinds = (list, tuple)
    return (
        isinstance(mesh, kinds)
        and len(mesh) == 2
        and all(isinstance(part, kinds) for part in mesh)
        and all(type(size) is int and 0 < size < 2**31 for size in mesh[0])
    )
