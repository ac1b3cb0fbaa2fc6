"""Constants of a GPU type from recorded metrics: medians over runs, and nothing from lines that are not ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_jobs.runs import Constants, Observation, load_constants, observe_memory, record_constants
from lora_jobs.units import GIB, MIB

if TYPE_CHECKING:
    from pathlib import Path


def row(allocated: int, reserved: int, used: int, *, now: int | None = None, kind: str = "train") -> dict[str, Any]:
    """A row of metrics.jsonl as a GPU run writes it, in MiB."""
    return {
        "kind": kind,
        "memory_allocated_bytes": allocated * MIB,
        "memory_reserved_bytes": reserved * MIB,
        "memory_reserved_now_bytes": (reserved if now is None else now) * MIB,
        "memory_device_used_bytes": used * MIB,
        "host_memory_bytes": GIB,
    }


ROWS = [
    {"kind": "note", "event": "started"},
    row(9000, 9500, 9500 + 300),
    row(10000, 11000, 11000 + 510),
    row(10000, 11000, 9000 + 510, now=9000),  # after empty_cache
    row(10000, 11000, 11000 + 520, kind="eval"),
]


def test_an_observation_is_what_is_outside_the_allocator_and_its_overhead() -> None:
    assert observe_memory(ROWS, gpu="L4", world_size=1) == Observation("L4", 1, 510 * MIB, 1.1)


def test_a_cpu_run_and_an_older_record_teach_nothing() -> None:
    cpu = [{"kind": "train", "memory_allocated_bytes": 0, "memory_reserved_bytes": 0, "host_memory_bytes": GIB}]
    older = [{"kind": "train", "memory_allocated_bytes": 5 * GIB, "memory_reserved_bytes": 6 * GIB}]
    assert observe_memory(cpu, gpu="cpu", world_size=1) is None
    assert observe_memory(older, gpu="L4", world_size=1) is None


def test_runs_are_combined_by_gpu_and_the_last_line_of_a_run_counts(tmp_path: Path) -> None:
    for run, gpu, world, outside, ratio in [
        ("a-1", "A100-64", 1, 480, 1.30),
        ("a-1", "A100-64", 1, 500, 1.05),
        ("b-1", "A100-64", 1, 520, 1.08),
        ("c-1", "A100-64", 4, 1110, 1.02),
        ("d-1", "L4", 2, 900, 1.2),
    ]:
        record_constants(tmp_path, run, Observation(gpu, world, outside * MIB, ratio))
    with (tmp_path / "constants.jsonl").open("a") as file:
        file.write(
            '{"run": "x", "gpu": "L4", "world_size": 1, "outside_bytes": -5, "reserved_ratio": 1.0}\n{"torn": \n[]\n'
        )
    found = load_constants(tmp_path)
    assert found.keys() == {"A100-64", "L4"}
    assert found["A100-64"] == Constants(3, 510 * MIB, 600 * MIB, found["A100-64"].allocator_worst)
    assert round(found["A100-64"].allocator_worst or 0, 4) == 0.08
    assert (found["L4"].context_bytes, found["L4"].nccl_bytes) == (None, None)


def test_no_file_is_no_constants(tmp_path: Path) -> None:
    assert load_constants(tmp_path) == {}
