"""Where an attempt runs: host, GPUs, every installed package, and what it trains from, by content."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import sys
import time
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from lora_jobs import __version__
from lora_jobs.errors import RunError
from lora_jobs.runs import write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lora_jobs.runs import Run
    from lora_jobs.training.launch import Launch

# Never all of the environment: it holds secrets.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "NCCL_DEBUG", "NCCL_SOCKET_IFNAME",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_JOB_NODELIST",
    "SLURM_JOB_PARTITION", "SLURM_JOB_QOS", "SLURM_NTASKS", "SLURM_RESTART_COUNT",
)  # fmt: skip
_USER_INFO = re.compile(r"(?<=://)[^/@\s]+@")
_DRIVER = Path("/proc/driver/nvidia/version")


def describe_place(launch: Launch) -> dict[str, Any]:
    """Where one rank is: its number, its host, its device."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"rank": launch.rank, "host": launch.host, "device": device}


def record_surroundings(run: Run, attempt: int, places: Iterable[Mapping[str, Any]], inputs: Mapping[str, Any]) -> None:
    """Write attempt-K.environment.json, by rank 0. It is worth no run: where it can't be written there is none."""
    values = {"attempt": attempt, "recorded_at": time.time(), **describe_machine(), "ranks": list(places)}
    text = json.dumps({**values, "inputs": dict(inputs), "packages": list_packages()}, indent=2) + "\n"
    with contextlib.suppress(RunError):
        write_atomic(run.directory / f"attempt-{attempt}.environment.json", text)


def describe_machine() -> dict[str, Any]:
    """This node: system, processor, memory, GPUs with their driver, Python."""
    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "cpus": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": list_gpus(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "driver": read_driver(),
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "lora_jobs": __version__,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def list_gpus() -> list[dict[str, Any]]:
    """The GPUs that this process sees, with their bytes and compute capability."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    rows = [torch.cuda.get_device_properties(number) for number in range(count)]
    return [
        {"name": row.name, "memory_bytes": row.total_memory, "capability": f"{row.major}.{row.minor}"} for row in rows
    ]


def read_driver() -> str | None:
    """The first line that NVIDIA's kernel module says of itself; None without one."""
    with contextlib.suppress(OSError):
        return _DRIVER.read_text(encoding="utf-8").splitlines()[0].partition("NVRM version:")[2].strip() or None
    return None


def list_packages() -> list[str]:
    """Every installed package as `pip freeze` writes it, sorted; a password in an address is left out."""
    found = {str(each.name).lower(): f"{each.name}{_find_origin(each)}" for each in distributions() if each.name}
    return [found[name] for name in sorted(found)]


def _find_origin(package: Distribution) -> str:
    """ "==VERSION", or " @ ADDRESS" of a package that came from elsewhere than an index. Source: PEP 610."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        direct = json.loads(package.read_text("direct_url.json") or "")
        source = direct.get("vcs_info", {})
        prefix = f"{source['vcs']}+" if source else ""
        suffix = f"@{source['commit_id']}" if source else ""
        return f" @ {prefix}{_USER_INFO.sub('', direct['url'])}{suffix}"
    return f"=={package.version}"
