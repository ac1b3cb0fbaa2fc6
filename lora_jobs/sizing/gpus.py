"""The GPUs that jobs are sized for: one row each.

`memory_bytes` is the total that nvidia-smi reports; `usable_bytes` is the total that CUDA reports (the "total
capacity" of torch's out-of-memory message; the lowest that is seen across drivers). The CUDA context comes out of the
usable part.
"""

from __future__ import annotations

import difflib
import re

from msgspec import Struct
from msgspec.structs import replace

from lora_jobs.errors import Problem, SpecError
from lora_jobs.units import GIB, MIB

CPU = "cpu"

ASSUMED_CONTEXT_BYTES = 512 * MIB
"""CUDA context where nobody measured it: the A100's 501 MiB, rounded up. Assumption."""

CUBLAS_WORKSPACE_BYTES = 2 * 8 * MIB
"""Two handles (forward and autograd thread) of 8 MiB; published for Ampere and older."""

HOPPER_CUBLAS_WORKSPACE_BYTES = 2 * 32 * MIB
"""The same on Hopper: 32 MiB a handle."""

NCCL_BYTES = 688 * MIB
"""NCCL's buffers on a rank; published: 544 to 688 on 4 x A100."""

ALLOCATOR_WORST = 0.17
"""Of the allocated peak: what the worst published case needed beside it on the smallest card that ran it."""


class Gpu(Struct, frozen=True):
    """One device type: what it has, and what CUDA takes of it before the first tensor."""

    name: str
    memory_bytes: int
    usable_bytes: int
    context_bytes: int
    source: str
    compute_capability: tuple[int, int] = (0, 0)
    workspace_bytes: int = 0
    nccl_bytes: int = NCCL_BYTES
    allocator_worst: float = ALLOCATOR_WORST
    """Share of the allocated peak that the allocator may need on top of it in the worst case known."""
    aliases: tuple[str, ...] = ()

    @property
    def is_cpu(self) -> bool:
        return self.name == CPU

    @property
    def has_bf16(self) -> bool:
        """bfloat16 and flash attention need Ampere (compute capability 8.0) or newer; a CPU has bfloat16."""
        return self.is_cpu or self.compute_capability >= (8, 0)


_SMI = "nvidia-smi memory.total, torch's reported capacity"
_MEASURED = _SMI + "; context published"
_ASSUMED = _SMI + "; context assumed"

# fmt: off
_ROWS: tuple[tuple[str, int, float, int, tuple[int, int], str, tuple[str, ...]], ...] = (
    # name, memory in MiB, usable in GiB, context in MiB (0: assumed), compute capability, source, other names
    ("2080Ti", 11264, 10.57, 0, (7, 5), _ASSUMED, ("NVIDIA GeForce RTX 2080 Ti", "RTX2080Ti", "2080ti-11")),
    ("T4", 15360, 14.56, 0, (7, 5), _ASSUMED, ("Tesla T4", "T4-16")),
    ("V100-16", 16384, 15.77, 0, (7, 0), _ASSUMED, ("Tesla V100-SXM2-16GB", "V100")),
    ("V100-32", 32768, 31.73, 0, (7, 0), _ASSUMED, ("Tesla V100-SXM2-32GB",)),
    ("A4000", 16376, 15.60, 0, (8, 6), _ASSUMED, ("NVIDIA RTX A4000", "A4000-16")),
    ("RTX3090", 24576, 23.56, 0, (8, 6), _ASSUMED, ("NVIDIA GeForce RTX 3090", "3090", "3090-24")),
    ("RTX4090", 24564, 23.52, 0, (8, 9), _ASSUMED, ("NVIDIA GeForce RTX 4090", "4090", "4090-24")),
    ("A10", 23028, 21.98, 0, (8, 6), _ASSUMED, ("NVIDIA A10", "A10G", "NVIDIA A10G", "A10-24")),
    ("L4", 23034, 21.95, 226, (8, 9), _MEASURED, ("NVIDIA L4", "L4-24")),
    ("RTX5090", 32607, 31.36, 0, (12, 0), _ASSUMED, ("NVIDIA GeForce RTX 5090", "5090", "5090-32")),
    ("A6000", 49140, 47.40, 0, (8, 6), _ASSUMED, ("NVIDIA RTX A6000", "RTXA6000", "A6000-48")),
    ("A40", 46068, 44.35, 0, (8, 6), _ASSUMED, ("NVIDIA A40", "A40-48")),
    ("L40S", 46068, 44.39, 0, (8, 9), _ASSUMED, ("NVIDIA L40S", "L40S-48")),
    ("A100-40", 40960, 39.38, 501, (8, 0), _MEASURED, ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB")),
    ("A100-64", 65536, 63.42, 501, (8, 0), _MEASURED, ("NVIDIA A100-SXM-64GB", "NVIDIA A100-SXM4-64GB")),
    ("A100-80", 81920, 79.14, 501, (8, 0), _MEASURED,
     ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe", "A100")),
    ("H100-80", 81559, 79.09, 0, (9, 0), _ASSUMED, ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "H100")),
    ("H200", 143771, 139.72, 0, (9, 0), _ASSUMED, ("NVIDIA H200", "H200-141")),
)
# fmt: on

GPUS: tuple[Gpu, ...] = tuple(
    Gpu(
        name=name,
        memory_bytes=memory_mib * MIB,
        usable_bytes=int(usable_gib * GIB),
        context_bytes=context_mib * MIB or ASSUMED_CONTEXT_BYTES,
        source=source,
        compute_capability=capability,
        workspace_bytes=HOPPER_CUBLAS_WORKSPACE_BYTES if capability >= (9, 0) else CUBLAS_WORKSPACE_BYTES,
        aliases=aliases,
    )
    for name, memory_mib, usable_gib, context_mib, capability, source, aliases in _ROWS
)


def _key(name: str) -> str:
    """A name without the marks that people write differently: "RTX 4090", "rtx4090", "NVIDIA-RTX_4090-24GB"."""
    letters = re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", name.lower())
    return re.sub(r"(?<=\d)gb?$", "", letters)


_BY_KEY = {_key(known): gpu for gpu in GPUS for known in (gpu.name, *gpu.aliases)}


def find_gpu(name: str) -> Gpu:
    """The row of a GPU type, whatever the spelling ("A100-64", "a100_64gb", nvidia-smi's own name)."""
    gpu = _BY_KEY.get(_key(name))
    if gpu is not None:
        return gpu
    near = difflib.get_close_matches(_key(name), list(_BY_KEY), n=1, cutoff=0.5)
    meant = f"; did you mean {_BY_KEY[near[0]].name}?" if near else ""
    message = f"unknown GPU {name!r}{meant}"
    raise SpecError(
        message,
        problems=[Problem("resources.gpu", message)],
        hint="known GPUs: " + ", ".join(gpu.name for gpu in GPUS),
    )


def cpu_device(memory_bytes: int) -> Gpu:
    """This machine without a GPU: its host memory is what the processes of a node share."""
    return Gpu(CPU, memory_bytes, memory_bytes, context_bytes=0, source="the machine's total memory")


def detected_gpu(name: str, memory_bytes: int) -> Gpu:
    """A GPU as its driver names it; outside the table, sized by its reported memory with the assumed context."""
    gpu = _BY_KEY.get(_key(name))
    if gpu is not None and abs(gpu.memory_bytes - memory_bytes) < GIB:
        return gpu
    return Gpu(
        name,
        memory_bytes,
        memory_bytes * 97 // 100,
        ASSUMED_CONTEXT_BYTES,
        source="memory reported by the driver, 3 % of it assumed kept; context assumed",
        compute_capability=(8, 0) if gpu is None else gpu.compute_capability,
        workspace_bytes=HOPPER_CUBLAS_WORKSPACE_BYTES,
    )


def calibrate_gpu(
    gpu: Gpu,
    *,
    runs: int,
    context_bytes: int | None = None,
    nccl_bytes: int | None = None,
    allocator_worst: float | None = None,
) -> Gpu:
    """The row with what the user's own runs measured in the place of what was published or assumed."""
    known = {"context_bytes": context_bytes, "nccl_bytes": nccl_bytes, "allocator_worst": allocator_worst}
    measured = {name: value for name, value in known.items() if value is not None}
    if gpu.is_cpu or not measured:
        return gpu
    source = f"{_SMI}; context measured in {runs} of your runs" if context_bytes is not None else gpu.source
    return replace(gpu, **measured, source=source)
