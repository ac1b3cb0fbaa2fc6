"""What would make a job fit: the estimator run again under changes; the smallest set that is enough comes first."""

from __future__ import annotations

import json
from itertools import combinations
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from lora_jobs.errors import SpecError
from lora_jobs.sizing.changes import CHANGES, Change, Cost, Settings
from lora_jobs.sizing.margins import Word, cautious_bytes, choose_verdict, required_bytes
from lora_jobs.sizing.memory import list_peaks
from lora_jobs.sizing.models import find_shape
from lora_jobs.sizing.refusals import find_unworkable
from lora_jobs.spec.load import replace_values

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from lora_jobs.sizing.gpus import Gpu
    from lora_jobs.sizing.memory import Estimate
    from lora_jobs.spec.job import JobSpec

MOST_TOGETHER = 3
"""Changes in one suggestion that is searched for as the smallest; beyond it changes are added, cheapest first."""

MOST_TRIED = 10
"""Sets of one size that are estimated in full; which ones, the sum of their single savings tells."""

SLACK = 1.03
"""Savings rarely add up exactly: a set that is predicted to miss by this much is tried all the same."""

_ORDER: tuple[Cost, ...] = ("none", "time", "other hardware", "result")


class Suggestion(Struct, frozen=True):
    """Settings for --set, and the peak that check gives with them."""

    set: Mapping[str, Any]
    peak_bytes: int
    verdict: Word
    why: str

    @property
    def fits(self) -> bool:
        return self.verdict != "does not fit"

    def to_json(self) -> dict[str, Any]:
        values = {"set": dict(self.set), "peak_bytes": self.peak_bytes, "fits": self.fits}
        return {**values, "verdict": self.verdict, "why": self.why}


class Elsewhere(Struct, frozen=True):
    """The same job on other hardware: its settings, the device that they lead to, and what they are."""

    set: Mapping[str, Any]
    gpu: Gpu
    why: str


class Trial(Struct, frozen=True):
    """One change and the estimate under it: allocated bytes at each instant, and what must fit."""

    change: Change | None
    settings: Settings
    spec: JobSpec
    gpu: Gpu
    peaks: Mapping[str, int]
    why: str
    cost: Cost

    @property
    def allocated(self) -> int:
        return max(self.peaks.values())

    @property
    def peak_bytes(self) -> int:
        return required_bytes(self.spec, self.gpu, self.allocated)

    @property
    def cautious_bytes(self) -> int:
        return cautious_bytes(self.spec, self.gpu, self.allocated)

    @property
    def word(self) -> Word:
        return choose_verdict(self.peak_bytes, self.cautious_bytes, self.gpu.usable_bytes)

    @property
    def room(self) -> float:
        """Bytes left beside what must fit; negative where it does not."""
        return self.gpu.usable_bytes - self.peak_bytes

    def suggest(self) -> Suggestion:
        return Suggestion(self.settings, self.peak_bytes, self.word, self.why)


def apply_settings(spec: JobSpec, settings: Mapping[str, Any]) -> JobSpec | None:
    """The spec with `settings` (dotted keys, as --set takes them); None where the spec's own rules refuse them."""
    try:
        return replace_values(spec, settings)
    except SpecError:
        return None


def try_as_is(spec: JobSpec, gpu: Gpu, estimate: Estimate) -> Trial:
    """The job without a change."""
    return Trial(None, {}, spec, gpu, estimate.peaks, "", "none")


def list_trials(spec: JobSpec, gpu: Gpu, elsewhere: Iterable[Elsewhere] = ()) -> tuple[Trial, ...]:
    """Every change that applies, each alone, cheapest first."""
    here = [trial for change in CHANGES if (trial := _try_change(spec, gpu, change)) is not None]
    there = [
        trial
        for place in elsewhere
        if (trial := _try_settings(spec, dict(place.set), place.gpu, place.why, "other hardware")) is not None
    ]
    return tuple(sorted([*here, *there], key=lambda trial: _ORDER.index(trial.cost)))


def suggest_changes(base: Trial, trials: Sequence[Trial]) -> tuple[Suggestion, ...]:
    """The smallest set of changes that is enough, cheapest first among equals; then the smallest that leaves the
    result of the training alone, if that is another; then every single change that helps, those that are enough first.

    A job that fits already (tightly) asks for more: to fit with the worst allocator known as well.
    """
    helping = tuple(trial for trial in trials if _helps(base, trial))
    first = find_smallest_set(base, helping, or_more=True)
    gentle = None
    if first is not None and first.cost == "result":
        harmless = tuple(trial for trial in helping if trial.cost != "result")
        gentle = find_smallest_set(base, harmless)
    enough = [trial for trial in helping if _is_enough(base, trial)]
    others = [] if base.room >= 0 else [trial for trial in helping if trial not in enough]
    unique: dict[str, Trial] = {}
    for trial in [*(trial for trial in (first, gentle) if trial is not None), *enough, *others]:
        unique.setdefault(json.dumps(trial.settings, sort_keys=True), trial)
    return tuple(trial.suggest() for trial in unique.values())


def find_smallest_set(base: Trial, trials: Sequence[Trial], *, or_more: bool = False) -> Trial | None:
    """The fewest changes that are enough together, the cheapest of them; None where no three are.

    With `or_more` as many as it takes, the cheapest first; None where all together are not enough.
    """
    for size in range(1, MOST_TOGETHER + 1):
        if size == 1:
            found = next((trial for trial in trials if _is_enough(base, trial)), None)
        else:
            joined = (_join(base, chosen) for chosen in _promising(base, trials, size))
            found = next((trial for trial in joined if trial is not None and _is_enough(base, trial)), None)
        if found is not None:
            return found
    return _add_until_enough(base) if or_more else None


def _helps(base: Trial, trial: Trial) -> bool:
    return trial.room > base.room


def _is_enough(base: Trial, trial: Trial) -> bool:
    """It fits; where the job itself does, tightly, it fits with the worst allocator too."""
    needed = trial.peak_bytes if base.room < 0 else trial.cautious_bytes
    return needed <= trial.gpu.usable_bytes


def _promising(base: Trial, trials: Sequence[Trial], size: int) -> Iterator[tuple[Trial, ...]]:
    """Sets of so many changes whose single savings add up to enough, cheapest first."""
    rank = {id(trial): place for place, trial in enumerate(trials)}
    hopeful = [
        chosen
        for chosen in combinations(trials, size)
        if _are_compatible(chosen) and _predict(base, chosen) <= SLACK * chosen[-1].gpu.usable_bytes
    ]
    hopeful.sort(key=lambda chosen: sorted((rank[id(trial)] for trial in chosen), reverse=True))
    yield from hopeful[:MOST_TRIED]


def _are_compatible(chosen: Sequence[Trial]) -> bool:
    """No two set the same key."""
    keys = [key for trial in chosen for key in trial.settings]
    return len(keys) == len(set(keys))


def _predict(base: Trial, chosen: Sequence[Trial]) -> float:
    """What must fit if the savings at each instant add up. A guess: who passes it is estimated in full."""
    place = next((trial for trial in chosen if trial.cost == "other hardware"), base)
    allocated = max(
        peak - sum(peak - trial.peaks.get(name, 0) for trial in chosen) for name, peak in base.peaks.items()
    )
    return required_bytes(place.spec, place.gpu, max(allocated, 0))


def _join(base: Trial, chosen: Sequence[Trial]) -> Trial | None:
    """The changes one after the other, each as it applies to what the others left; None where one no longer does."""
    settings: Settings = {}
    spec = base.spec
    place = next((trial for trial in chosen if trial.cost == "other hardware"), base)
    for trial in chosen:
        change = trial.change
        more = (
            trial.settings if change is None else change.settings(spec, find_shape(spec.model.name_or_path), place.gpu)
        )
        changed = apply_settings(spec, more) if more else None
        if changed is None:
            return None
        settings, spec = {**settings, **more}, changed
    why = "together: " + "; ".join(trial.why.split(";", maxsplit=1)[0] for trial in chosen)
    cost = max((trial.cost for trial in chosen), key=_ORDER.index)
    return _try_settings(base.spec, settings, place.gpu, why, cost)


def _add_until_enough(base: Trial) -> Trial | None:
    """The cheapest changes one after the other until the job fits, without those that turn out not needed."""
    taken: list[Trial] = []
    now = base
    for change in CHANGES:
        more = _try_change(now.spec, now.gpu, change)
        if more is None or not _helps(now, more):
            continue
        taken.append(more)
        now = more
        if _is_enough(base, now):
            break
    else:
        return None
    for unneeded in reversed(taken[:-1]):
        fewer = _merge(base, [one for one in taken if one is not unneeded])
        if fewer is not None and _is_enough(base, fewer):
            taken = [one for one in taken if one is not unneeded]
    return _merge(base, taken)


def _merge(base: Trial, taken: Sequence[Trial]) -> Trial | None:
    """The settings of all, the later ones beating the earlier."""
    settings = {key: value for one in taken for key, value in one.settings.items()}
    why = "together: " + "; ".join(dict.fromkeys(one.why.split(";", maxsplit=1)[0] for one in taken))
    cost = max((one.cost for one in taken), key=_ORDER.index)
    return _try_settings(base.spec, settings, base.gpu, why, cost)


def _try_change(spec: JobSpec, gpu: Gpu, change: Change) -> Trial | None:
    shape = find_shape(spec.model.name_or_path)
    settings = change.settings(spec, shape, gpu)
    return _try_settings(spec, settings, gpu, change.explain(spec, shape), change.cost, change) if settings else None


def _try_settings(
    spec: JobSpec, settings: Settings, gpu: Gpu, why: str, cost: Cost, change: Change | None = None
) -> Trial | None:
    changed = apply_settings(spec, settings)
    if changed is None:
        return None
    try:
        shape = find_shape(changed.model.name_or_path)
        if find_unworkable(changed, shape, gpu):
            return None
        peaks = list_peaks(changed, shape, gpu)
    except SpecError:
        return None
    return Trial(change, settings, changed, gpu, peaks, why, cost)
