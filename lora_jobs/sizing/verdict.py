"""The answer of `check`: does the job fit the device, what is its memory for, and what would make it fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import Struct

from lora_jobs.sizing.attention import ResolvedAttention, resolve_attention
from lora_jobs.sizing.cards import Card, compare_cards, find_smallest_gpu
from lora_jobs.sizing.cautions import describe_trainable, list_warnings
from lora_jobs.sizing.margins import Word, choose_verdict
from lora_jobs.sizing.memory import Estimate, estimate_memory
from lora_jobs.sizing.models import find_shape
from lora_jobs.sizing.moments import Moment, find_death, find_peak, list_moments
from lora_jobs.sizing.parameters import count_parameters, count_trainable
from lora_jobs.sizing.refusals import refuse_unworkable
from lora_jobs.sizing.suggestions import Elsewhere, Suggestion, list_trials, suggest_changes, try_as_is
from lora_jobs.units import format_gib

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lora_jobs.errors import Problem
    from lora_jobs.sizing.gpus import Gpu
    from lora_jobs.spec.job import JobSpec


class Verdict(Struct, frozen=True):
    """Whether a job fits, and everything that says why."""

    gpu: Gpu
    world_size: int
    parameters_base: int
    parameters_trainable: int
    trainable_words: str
    estimate: Estimate
    peak: Moment
    death: Moment | None
    """The first moment that does not fit."""
    suggestions: tuple[Suggestion, ...]
    warnings: tuple[str, ...]
    problems: tuple[Problem, ...] = ()
    smallest_gpu: str | None = None
    """Where it does not fit: the smallest GPU of the table that would do; None where none does."""
    cards: tuple[Card, ...] = ()
    """The same job on other GPUs."""
    attention: ResolvedAttention | None = None
    """None of a model that only a trace knows."""

    @property
    def word(self) -> Word:
        estimate = self.estimate
        return choose_verdict(estimate.peak_bytes, estimate.cautious_peak_bytes, self.gpu.usable_bytes)

    @property
    def fits(self) -> bool:
        """Also where it is tight."""
        return self.word != "does not fit"

    def to_json(self) -> dict[str, Any]:
        """The document of `check --json`; keys are stable."""
        estimate = self.estimate
        return {
            "fits": self.fits,
            "verdict": self.word,
            "world_size": self.world_size,
            "gpu": {
                "name": self.gpu.name,
                "memory_bytes": self.gpu.memory_bytes,
                "usable_bytes": self.gpu.usable_bytes,
            },
            "parameters": {"base": self.parameters_base, "trainable": self.parameters_trainable},
            "attention": self.attention.to_json() if self.attention else None,
            "estimate": {
                "peak_bytes": estimate.peak_bytes,
                "cautious_peak_bytes": estimate.cautious_peak_bytes,
                "allocated_peak_bytes": estimate.allocated_peak_bytes,
                "components": dict(estimate.components),
                "binding_instant": estimate.binding_instant,
                "instants": estimate.peaks,
            },
            "peak": self.peak.to_json(),
            "dies": self.death.to_json() if self.death else None,
            "host_memory_bytes": estimate.host_memory_bytes,
            "checkpoint_bytes": estimate.checkpoint_bytes,
            "problems": [problem.to_json() for problem in self.problems],
            "warnings": list(self.warnings),
            "suggestions": [suggestion.to_json() for suggestion in self.suggestions],
            "smallest_gpu": self.smallest_gpu,
            "other_gpus": [card.to_json() for card in self.cards],
        }


def size_job(
    spec: JobSpec,
    gpu: Gpu,
    *,
    warnings: Sequence[str] = (),
    advise: bool = True,
    elsewhere: Iterable[Elsewhere] = (),
    cards: Sequence[Gpu] = (),
) -> Verdict:
    """Size the job for one device type. SpecError for an unknown model, targets that match nothing, or settings
    that the libraries refuse; whether it fits is in the verdict, not an error.

    `advise` searches for what would make it fit, `elsewhere` (other hardware of the cluster) included; `cards` are
    other GPUs to say the same of.
    """
    shape = find_shape(spec.model.name_or_path)
    refuse_unworkable(spec, shape, gpu)
    estimate = estimate_memory(spec, shape, gpu)
    word = choose_verdict(estimate.peak_bytes, estimate.cautious_peak_bytes, gpu.usable_bytes)
    moments = list_moments(spec, shape, estimate.instants)
    searches = advise and word != "fits"
    base = try_as_is(spec, gpu, estimate)
    trials = list_trials(spec, gpu, elsewhere if searches else ()) if searches or (advise and cards) else ()
    return Verdict(
        gpu=gpu,
        world_size=spec.resources.world_size,
        parameters_base=count_parameters(shape),
        parameters_trainable=count_trainable(shape, spec.lora),
        trainable_words=describe_trainable(spec, shape),
        estimate=estimate,
        peak=find_peak(moments),
        death=find_death(spec, gpu, moments),
        suggestions=suggest_changes(base, trials) if searches else (),
        warnings=(*warnings, *_tight_warnings(word, estimate, gpu), *list_warnings(spec, shape, gpu, estimate)),
        smallest_gpu=find_smallest_gpu(base) if word == "does not fit" and advise else None,
        cards=compare_cards(base, trials, moments, cards),
        attention=resolve_attention(spec, shape, gpu),
    )


def _tight_warnings(word: Word, estimate: Estimate, gpu: Gpu) -> Iterable[str]:
    if word == "tight":
        yield (
            f"tight: {format_gib(gpu.usable_bytes - estimate.peak_bytes)} to spare; with the worst fragmentation known "
            f"it would miss {format_gib(estimate.cautious_peak_bytes - gpu.usable_bytes)}"
        )
