"""GPUs by whatever name they are given."""

from __future__ import annotations

import pytest

from lora_jobs.errors import SpecError
from lora_jobs.sizing import GPUS, cpu_device, detected_gpu, find_gpu
from lora_jobs.sizing.gpus import ASSUMED_CONTEXT_BYTES
from lora_jobs.units import GIB, MIB


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("A100-64", "A100-64"),
        ("a100_64gb", "A100-64"),
        ("NVIDIA A100-SXM-64GB", "A100-64"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA A100 80GB PCIe", "A100-80"),
        ("rtx 4090", "RTX4090"),
        ("NVIDIA GeForce RTX 2080 Ti", "2080Ti"),
        ("Tesla V100-SXM2-32GB", "V100-32"),
        ("NVIDIA H100 80GB HBM3", "H100-80"),
        ("NVIDIA L40S", "L40S"),
        ("l4", "L4"),
        ("NVIDIA H200", "H200"),
    ],
)
def test_spellings(spelled: str, name: str) -> None:
    assert find_gpu(spelled).name == name


def test_every_row_is_found_by_its_own_names_and_holds_together() -> None:
    for gpu in GPUS:
        assert [find_gpu(name) for name in (gpu.name, *gpu.aliases)] == [gpu] * (1 + len(gpu.aliases))
        assert gpu.context_bytes < gpu.usable_bytes < gpu.memory_bytes < 1.07 * gpu.usable_bytes


def test_an_unknown_gpu_says_what_was_meant() -> None:
    with pytest.raises(SpecError, match="unknown GPU 'A100-65'; did you mean A100-64") as caught:
        find_gpu("A100-65")
    assert caught.value.problems[0].path == "resources.gpu"
    assert "H200" in (caught.value.hint or "")


def test_leonardos_card() -> None:
    gpu = find_gpu("A100-64")
    assert (gpu.memory_bytes, gpu.context_bytes, gpu.has_bf16) == (64 * GIB, 501 * MIB, True)
    assert not find_gpu("V100-16").has_bf16


def test_a_detected_card_outside_the_table_is_sized_by_what_it_reports() -> None:
    assert detected_gpu("NVIDIA L4", 23034 * MIB) == find_gpu("L4")
    unknown = detected_gpu("NVIDIA B300", 275 * GIB)
    assert (unknown.memory_bytes, unknown.usable_bytes) == (275 * GIB, 275 * GIB * 97 // 100)
    assert unknown.context_bytes == ASSUMED_CONTEXT_BYTES


def test_a_cpu_has_its_hosts_memory() -> None:
    device = cpu_device(16 * GIB)
    assert (device.name, device.usable_bytes, device.context_bytes, device.is_cpu) == ("cpu", 16 * GIB, 0, True)
