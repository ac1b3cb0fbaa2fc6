"""The tables that a user may look things up in, as rows of plain values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_jobs.sizing import GPUS, MODELS, count_parameters
from lora_jobs.spec import list_environments

if TYPE_CHECKING:
    from lora_jobs.errors import SpecError

Row = dict[str, Any]


def list_models() -> list[Row]:
    """The models whose shape is known, with their exact parameter counts and the hub's ids that they go by."""
    return [
        {
            "name": shape.name,
            "family": shape.family,
            "parameters": count_parameters(shape),
            "source": f"{shape.source} of {', '.join(shape.hub_ids)}",
        }
        for shape in MODELS
    ]


def list_gpus() -> list[Row]:
    """The GPU types that jobs are sized for; bytes as the driver reports them, and as CUDA offers them."""
    return [
        {"name": gpu.name, "memory_bytes": gpu.memory_bytes, "usable_bytes": gpu.usable_bytes, "source": gpu.source}
        for gpu in GPUS
    ]


def list_partitions() -> tuple[list[Row], list[SpecError]]:
    """Every partition of every environment; one without partitions is one row. Unreadable files stand beside."""
    rows = []
    environments, errors = list_environments()
    for environment in environments:
        for name, partition in environment.partitions.items() or [(None, None)]:
            row = {"cluster": environment.name, "scheduler": environment.scheduler, "partition": name}
            for key in ("gpu", "gpus_per_node", "max_time", "max_nodes"):
                row[key] = getattr(partition, key, None)
            rows.append(row)
    return rows, errors
