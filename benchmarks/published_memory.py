"""The closed form beside runs that others published: changes of memory, as the closed form counts allocated bytes and
they report what the allocator reserved, or what the driver showed. `make readme` writes the table into docs/memory.md.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memory import build_spec

from lora_jobs.sizing import ModelShape, find_gpu, find_shape
from lora_jobs.sizing.instants import list_instants

if TYPE_CHECKING:
    from lora_jobs.spec import JobSpec

PEFT_SOURCE = "PEFT, method_comparison/MetaMathQA: Llama 3.2 3B in bf16 on an L40S, batch 4, peak reserved bytes"
PEFT_RESERVED = {
    "r 32 on q, v": (22_292_725_760, {"lora__r": 32, "lora__target_modules": ["q_proj", "v_proj"]}),
    "r 64 on q, v": (22_552_772_608, {"lora__r": 64, "lora__target_modules": ["q_proj", "v_proj"]}),
    "r 10 on gate, up, down": (
        24_698_159_104,
        {"lora__r": 10, "lora__target_modules": ["gate_proj", "up_proj", "down_proj"]},
    ),
}
PEFT_TOKENS = 692
"""Of the longest batch: read off the stock loss, which is the peak of the first of the runs."""

QWEN_SOURCE = "Qwen-7B's README: LoRA on one A100-80, batch 1, flash attention, checkpointing, r 64"
QWEN_BYTES = {256: 20.1e9, 512: 20.4e9, 1024: 21.5e9, 2048: 23.8e9, 4096: 29.7e9, 8192: 36.6e9}
QWEN_ENDS = (1024, 8192)
"""Where the published figure grows with the length; from 256 to 512 tokens it moves by 0.3 GB only."""
QWEN = ModelShape("qwen-7b", "llama", 151936, 4096, 11008, 32, 32, 32, 128, False, 8192, source=QWEN_SOURCE)

MEGA = 1e6


@dataclass(frozen=True, slots=True)
class Comparison:
    """One published figure and ours, in bytes, and what it can be divided by."""

    name: str
    published: float
    predicted: float
    of_total: float | None = None
    """The published peak that a change is a part of; None for a slope."""

    @property
    def percent(self) -> float:
        """Error of the figure itself."""
        return 100 * (self.predicted / self.published - 1)

    @property
    def percent_of_total(self) -> float | None:
        """The same bytes beside the whole peak: how far off the second run is, the first taken as published."""
        return None if self.of_total is None else 100 * (self.predicted - self.published) / self.of_total


def compare_published() -> list[Comparison]:
    """PEFT's changes against the first of its runs; Qwen's bytes a token."""
    return [*_compare_peft(), *_compare_qwen()]


def _peak(spec: JobSpec, shape: ModelShape) -> int:
    return max(instant.total for instant in list_instants(spec, shape, find_gpu("A100-80")))


def _predict_peft(changes: dict[str, Any]) -> int:
    spec = build_spec(
        "llama-3.2-3b",
        model__attn_implementation="sdpa",
        lora__lora_dropout=0.0,
        data__max_length=PEFT_TOKENS,
        training__trainer="transformers",
        training__per_device_train_batch_size=4,
        training__bf16=False,
        training__activation_checkpointing=False,
        training__optim="adamw_torch",
        **changes,
    )
    return _peak(spec, find_shape("llama-3.2-3b"))


def _compare_peft() -> list[Comparison]:
    predicted = {name: _predict_peft(changes) for name, (_, changes) in PEFT_RESERVED.items()}
    first, *others = PEFT_RESERVED
    return [
        Comparison(
            f"PEFT: from {first} to {name}",
            PEFT_RESERVED[name][0] - PEFT_RESERVED[first][0],
            predicted[name] - predicted[first],
            of_total=PEFT_RESERVED[name][0],
        )
        for name in others
    ]


def _predict_qwen(tokens: int) -> int:
    spec = build_spec(
        "llama-3.2-1b",  # the settings only; the shape is QWEN
        model__attn_implementation="flash_attention_2",
        lora__r=64,
        data__max_length=tokens,
        training__trainer="transformers",
    )
    return _peak(spec, QWEN)


def _compare_qwen() -> list[Comparison]:
    peaks = {tokens: _predict_qwen(tokens) for tokens in QWEN_BYTES}
    short, long = QWEN_ENDS
    ends = [(by_length[long] - by_length[short]) / (long - short) for by_length in (QWEN_BYTES, peaks)]
    lines = [
        statistics.linear_regression(list(QWEN_BYTES), list(by_length.values())).slope
        for by_length in (QWEN_BYTES, peaks)
    ]
    return [
        Comparison(f"Qwen-7B: bytes a token, {short:,} to {long:,}", *ends),
        Comparison("Qwen-7B: bytes a token, a line through all six lengths", *lines),
    ]


def render_published(found: list[Comparison]) -> str:
    """The table of docs/memory.md."""
    lines = ["| published | theirs, MB | ours, MB | error of the figure | of the whole peak |", "|---|---|---|---|---|"]
    for row in found:
        digits = 2 if row.of_total is None else 1
        theirs, ours = (f"{size / MEGA:,.{digits}f}" for size in (row.published, row.predicted))
        whole = "" if row.percent_of_total is None else f"{row.percent_of_total:+.2f} %"
        lines.append(f"| {row.name} | {theirs} | {ours} | {row.percent:+.1f} % | {whole} |")
    return "\n" + "\n".join(lines) + "\n\n"


def render_summary(found: list[Comparison]) -> str:
    """The README's line."""
    whole = max(abs(row.percent_of_total) for row in found if row.percent_of_total is not None)
    change = [row.percent for row in found if row.percent_of_total is not None]
    slope = next(abs(row.percent) for row in found if row.percent_of_total is None)
    ends = " to ".join(f"{tokens:,}" for tokens in QWEN_ENDS)
    return (
        f"\nBeside runs that others published: of PEFT's Llama 3.2 3B peaks one gives the others within {whole:.1f} % "
        f"(the changes\nthemselves are {change[0]:+.0f} % and {change[1]:+.0f} % off), and Qwen-7B's bytes a token, "
        f"{ends}, agree within {slope:.1f} % ([docs/memory.md](docs/memory.md)).\n\n"
    )
