"""The same job on other GPUs: whether it fits, where it would die, and the smallest change that is enough there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

from lora_jobs.sizing.gpus import GPUS, Gpu
from lora_jobs.sizing.moments import Moment, find_death
from lora_jobs.sizing.suggestions import Suggestion, Trial, find_smallest_set

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lora_jobs.sizing.margins import Word

COMMON = {"RTX4090": 24, "RTX5090": 32, "L40S": 48, "A100-80": 80}
"""One card a size that people have, and that size in GB as its maker writes it."""

SAME_SIZE = 0.05
"""Cards whose memory differs by less than this share are one size."""


class Card(Struct, frozen=True):
    """One other GPU."""

    gpu: Gpu
    peak_bytes: int
    word: Word
    death: Moment | None
    suggestion: Suggestion | None

    def to_json(self) -> dict[str, Any]:
        return {
            "gpu": self.gpu.name,
            "memory_bytes": self.gpu.memory_bytes,
            "usable_bytes": self.gpu.usable_bytes,
            "peak_bytes": self.peak_bytes,
            "fits": self.word != "does not fit",
            "verdict": self.word,
            "dies": self.death.to_json() if self.death else None,
            "suggestion": self.suggestion.to_json() if self.suggestion else None,
        }


def list_common_cards(gpu: Gpu) -> tuple[Gpu, ...]:
    """A card of each common size other than this GPU's own, smallest first."""
    rows = [row for name in COMMON for row in GPUS if row.name == name]
    return tuple(row for row in rows if abs(row.memory_bytes / gpu.memory_bytes - 1) > SAME_SIZE)


def compare_cards(
    base: Trial, trials: Iterable[Trial], moments: Sequence[Moment], cards: Iterable[Gpu]
) -> tuple[Card, ...]:
    """The job on each of these cards. What is allocated does not depend on a card's size, only on what it can do:
    cards of another ability than the job's own (no bfloat16, a CPU) are left out.
    """
    here = [trial for trial in trials if trial.cost != "other hardware"]
    same = [card for card in cards if (card.has_bf16, card.is_cpu) == (base.gpu.has_bf16, base.gpu.is_cpu)]
    return tuple(_compare(base, here, moments, card) for card in same)


def _compare(base: Trial, trials: Sequence[Trial], moments: Sequence[Moment], card: Gpu) -> Card:
    there = replace(base, gpu=card)
    if there.room >= 0:
        return Card(card, there.peak_bytes, there.word, None, None)
    smallest = find_smallest_set(there, [replace(trial, gpu=card) for trial in trials], or_more=True)
    death = find_death(base.spec, card, moments)
    return Card(card, there.peak_bytes, there.word, death, smallest.suggest() if smallest else None)


def find_smallest_gpu(base: Trial) -> str | None:
    """The smallest GPU of the table that the job fits as it is; None where none does."""
    rows = sorted((gpu for gpu in GPUS if gpu.has_bf16), key=lambda gpu: gpu.usable_bytes)
    return next((gpu.name for gpu in rows if replace(base, gpu=gpu).room >= 0), None)
