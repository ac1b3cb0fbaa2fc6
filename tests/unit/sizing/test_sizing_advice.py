"""What is suggested, and said of other cards: the smallest set that is enough first, and every number kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace

from lora_jobs.sizing import Elsewhere, estimate_memory, find_gpu, find_shape, list_common_cards, size_job
from lora_jobs.sizing.margins import ALLOCATOR_MARGIN, choose_verdict
from lora_jobs.sizing.moments import find_death, list_moments
from lora_jobs.spec import replace_values
from lora_jobs.units import GIB

if TYPE_CHECKING:
    from conftest import SpecMaker

GEMMA = {
    "model.name_or_path": "google/gemma-2-9b-it",
    "model.attn_implementation": None,
    "lora.r": 64,
    "lora.modules_to_save": ["embed_tokens", "lm_head"],
    "data.max_length": 2048,
    "data.eval": "eval.jsonl",
    "training.eval_steps": 10,
    "training.per_device_eval_batch_size": 8,
    "training.gradient_accumulation_steps": 16,
    "deepspeed.zero_stage": 2,
    "resources.gpus_per_node": 2,
}
LONG = {"data.max_length": 16384, "training.activation_checkpointing": False, "training.per_device_train_batch_size": 2}
QWEN = {"model.name_or_path": "Qwen/Qwen2.5-7B-Instruct", "data.max_length": 4096, "lora.r": 32}

# Where no single change is enough: spec, card, how many changes the smallest set takes.
TOGETHER: dict[str, tuple[dict[str, Any], str, int]] = {
    "stock loss and evaluation": (GEMMA, "A100-40", 2),
    "long rows": (LONG, "L4", 2),
    "weights and activations": (QWEN | {"training.activation_checkpointing": False}, "L4", 2),
    "gemma on a workstation": (GEMMA, "RTX4090", 3),
    "one gpu": (GEMMA | {"resources.gpus_per_node": 1}, "RTX5090", 2),
}


SINGLE_PRECISION = {"model.dtype": "float32", "model.attn_implementation": "sdpa", "training.bf16": False}


@pytest.mark.parametrize("case", TOGETHER)
def test_sets_keep_their_promise_and_none_of_them_can_do_without_a_part(make_spec: SpecMaker, case: str) -> None:
    changes, name, size = TOGETHER[case]
    spec, gpu = make_spec(changes), find_gpu(name)
    verdict = size_job(spec, gpu)
    first = verdict.suggestions[0]
    assert not verdict.fits
    assert first.fits
    assert first.why.startswith("together: ")
    assert first.why.count("; ") == size - 1
    again = size_job(replace_values(spec, first.set), gpu, advise=False)
    assert (again.estimate.peak_bytes, again.word) == (first.peak_bytes, first.verdict)
    singles = [suggestion for suggestion in verdict.suggestions if not suggestion.why.startswith("together: ")]
    assert singles
    assert not any(single.fits for single in singles)


def test_a_single_change_comes_before_any_set_and_the_harmless_set_second(make_spec: SpecMaker) -> None:
    verdict = size_job(make_spec(GEMMA | {"resources.gpus_per_node": 1, "lora.r": 80}), find_gpu("A100-64"))
    first, second, *_ = verdict.suggestions
    assert dict(first.set) == {"lora.modules_to_save": []}
    assert second.why.startswith("together: ")
    assert second.fits
    assert "lora.modules_to_save" not in second.set


@pytest.mark.parametrize("changes", [GEMMA, LONG, QWEN, SINGLE_PRECISION])
def test_every_card_is_sized_as_check_would_size_it(make_spec: SpecMaker, changes: dict[str, Any]) -> None:
    spec, gpu = make_spec(changes), find_gpu("A100-64")
    verdict = size_job(spec, gpu, cards=list_common_cards(gpu))
    assert [card.gpu.name for card in verdict.cards] == ["RTX4090", "RTX5090", "L40S", "A100-80"]
    for card in verdict.cards:
        there = size_job(spec, card.gpu, advise=False)
        assert (card.peak_bytes, card.word, card.death) == (there.estimate.peak_bytes, there.word, there.death)
        assert (card.suggestion is None) == there.fits
        if card.suggestion is not None:
            changed = size_job(replace_values(spec, card.suggestion.set), card.gpu, advise=False)
            assert (changed.estimate.peak_bytes, changed.word) == (card.suggestion.peak_bytes, card.suggestion.verdict)
            assert changed.fits


def test_the_jobs_own_size_and_cards_of_another_ability_are_left_out(make_spec: SpecMaker) -> None:
    assert "A100-80" not in {card.name for card in list_common_cards(find_gpu("H100-80"))}
    old = find_gpu("V100-16")
    spec = make_spec({"model.attn_implementation": "sdpa"})
    assert size_job(spec, old, cards=list_common_cards(old)).cards == ()


def test_other_hardware_is_suggested_with_its_own_margins(make_spec: SpecMaker) -> None:
    spec, gpu, larger = make_spec(GEMMA | {"resources.gpus_per_node": 1}), find_gpu("RTX5090"), find_gpu("H200")
    place = Elsewhere({"resources.gpus_per_node": 4, "training.gradient_accumulation_steps": 4}, larger, "4 x H200")
    verdict = size_job(spec, gpu, elsewhere=[place])
    (found,) = [suggestion for suggestion in verdict.suggestions if suggestion.why == "4 x H200"]
    again = size_job(replace_values(spec, found.set), larger, advise=False)
    assert (found.peak_bytes, found.verdict) == (again.estimate.peak_bytes, again.word)


def test_the_three_verdicts_meet_at_the_two_sums(make_spec: SpecMaker) -> None:
    spec, gpu = make_spec(), find_gpu("A100-64")
    estimate = size_job(spec, gpu).estimate
    peak, cautious = estimate.peak_bytes, estimate.cautious_peak_bytes
    assert (
        peak
        < cautious
        == peak
        + round(estimate.allocated_peak_bytes * gpu.allocator_worst)
        - round(estimate.allocated_peak_bytes * ALLOCATOR_MARGIN)
    )
    words = [choose_verdict(peak, cautious, usable) for usable in (peak - 1, peak, cautious - 1, cautious)]
    assert words == ["does not fit", "tight", "tight", "fits"]


def test_a_tight_job_fits_warns_and_says_how_to_be_sure(make_spec: SpecMaker) -> None:
    spec, gpu = make_spec({"training.per_device_train_batch_size": 4}), find_gpu("A100-64")
    narrow = replace(gpu, usable_bytes=size_job(spec, gpu).estimate.peak_bytes + GIB // 2)
    verdict = size_job(spec, narrow)
    assert (verdict.word, verdict.fits, verdict.to_json()["verdict"], verdict.death) == ("tight", True, "tight", None)
    assert any(warning.startswith("tight: 0.5 GiB to spare") for warning in verdict.warnings)
    assert verdict.suggestions
    assert {suggestion.verdict for suggestion in verdict.suggestions} == {"fits"}


def test_moments_tell_when_the_optimizers_state_is_there(make_spec: SpecMaker) -> None:
    changes = {"data.eval": "eval.jsonl", "training.eval_steps": 7}
    words = {}
    for name, more in (("plain", {}), ("zero", {"deepspeed.zero_stage": 2})):
        spec = make_spec(changes | more)
        shape = find_shape(spec.model.name_or_path)
        estimate = estimate_memory(spec, shape, find_gpu("L4"))
        moments = list_moments(spec, shape, estimate.instants)
        assert [moment.step for moment in moments] == sorted(moment.step for moment in moments)
        assert max(moment.allocated_bytes for moment in moments) == estimate.allocated_peak_bytes
        words[name] = {moment.when for moment in moments if moment.instant in ("loss_backward", "evaluation_loss")}
    before, at_evaluation = "before step 1, in the first evaluation", "at step 7, in the evaluation"
    assert words["zero"] == {before, "at step 1"}
    assert words["plain"] == {before, "at step 1", "at step 2, beside the optimizer's state", at_evaluation}


def test_a_job_dies_at_the_first_moment_that_does_not_fit(make_spec: SpecMaker) -> None:
    spec = make_spec(GEMMA)
    shape = find_shape(spec.model.name_or_path)
    gpu = find_gpu("A100-64")
    moments = list_moments(spec, shape, estimate_memory(spec, shape, gpu).instants)
    death = find_death(spec, gpu, moments)
    assert death is not None
    assert (death.instant, death.when) == ("evaluation_loss", "before step 1, in the first evaluation")
    assert death.what == "the loss of an evaluation batch of 8 x 2,048 tokens over 256,000 tokens of vocabulary"
    small = [find_death(spec, find_gpu(name), moments) for name in ("T4", "RTX5090")]
    assert [(death.instant, death.what) for death in small if death] == [
        ("model_load", "loading the model"),
        ("setup", "setting up the optimizer"),
    ]


def test_an_evaluation_that_kills_a_job_that_trains_is_said(make_spec: SpecMaker) -> None:
    warnings = size_job(make_spec(GEMMA), find_gpu("A100-64")).warnings
    assert [warning for warning in warnings if "training fits" in warning and "the evaluation does not" in warning]
    smaller = make_spec(GEMMA | {"training.per_device_eval_batch_size": 1})
    assert not any("training fits" in warning for warning in size_job(smaller, find_gpu("A100-64")).warnings)


def test_a_large_trainable_count_says_what_makes_it_up(make_spec: SpecMaker) -> None:
    (warning,) = [text for text in size_job(make_spec(GEMMA), find_gpu("H200")).warnings if "is trained" in text]
    assert "22.2% of the base" in warning
    assert "216,072,192 adapters of r 64, 917,504,000 copy of embed_tokens, 917,504,000 copy of lm_head" in warning
