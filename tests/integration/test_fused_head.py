"""TRL's fused head on a CPU: only what is learnt is scored, and it is the loss of scoring everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from trl.kernels import chunked_logprob
from trl.trainer import utils

from lora_jobs.sizing.losses import CPU_TILE_COLUMNS
from lora_jobs.training.libraries import fit_head_to_cpu

pytestmark = pytest.mark.train


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens the head has been asked for, a number per tile; TRL's own rules stand again afterwards."""
    counts: list[int] = []
    fold = chunked_logprob._forward_tile

    def count(tile: torch.Tensor, *rest: Any, **options: Any) -> None:
        counts.append(len(tile))
        fold(tile, *rest, **options)

    monkeypatch.setattr(chunked_logprob, "_forward_tile", count)
    monkeypatch.setattr(utils, "_use_triton", utils._use_triton)
    monkeypatch.setattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", utils._CHUNKED_LOGPROB_CHUNK_SIZE)
    return counts


def score(labels: torch.Tensor, vocabulary: int = 96) -> tuple[float, torch.Tensor]:
    """Loss, and the gradient of the embeddings, which the head is tied to."""
    torch.manual_seed(0)
    shape = {"vocab_size": vocabulary, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(**shape, num_attention_heads=2, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config)
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    ids = torch.arange(labels.numel()).reshape(labels.shape) % 96
    loss = model(input_ids=ids, labels=labels, fused_lm_head=True).loss
    loss.backward()
    return loss.item(), model.get_input_embeddings().weight.grad


def test_prompts_are_not_scored_and_the_loss_and_its_gradients_are_the_same(scored: list[int]) -> None:
    labels = torch.full((2, 12), -100)
    labels[0, 9:], labels[1, 4:6] = torch.arange(3), torch.arange(2)
    whole, gradient = score(labels)
    assert scored == [2 * 11]
    scored.clear()
    fit_head_to_cpu()
    short, other = score(labels)
    assert scored == [3 + 2]
    assert short == pytest.approx(whole, rel=1e-6)
    torch.testing.assert_close(other, gradient)


def test_a_batch_without_a_completion_costs_nothing_and_adds_nothing(scored: list[int]) -> None:
    fit_head_to_cpu()
    loss, gradient = score(torch.full((2, 12), -100))
    assert (scored, loss) == ([], 0.0)
    assert not gradient.any()


def test_a_large_vocabulary_is_scored_in_small_tiles_to_the_same_loss(scored: list[int]) -> None:
    labels = torch.arange(24).reshape(2, 12)
    whole, gradient = score(labels, 2 * CPU_TILE_COLUMNS + 9)
    assert scored == [2 * 11]
    scored.clear()
    fit_head_to_cpu()
    tiled, other = score(labels, 2 * CPU_TILE_COLUMNS + 9)
    assert scored == [2 * 11] * 3
    assert tiled == pytest.approx(whole, rel=1e-6)
    torch.testing.assert_close(other, gradient)
