"""TRL's fused head on a CPU: only what is learnt is scored, and it is the loss of scoring everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from trl.kernels import chunked_logprob
from trl.trainer import utils

from lora_jobs.sizing.losses import CPU_TILE_COLUMNS
from lora_jobs.training.cpu_head import fit_head_to_cpu

pytestmark = pytest.mark.train


@pytest.fixture(autouse=True)
def _own_rules_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (
        (utils, "_use_triton"),
        (utils, "_CHUNKED_LOGPROB_CHUNK_SIZE"),
        (chunked_logprob, "_forward_tile"),
        (chunked_logprob, "_backward_tile"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))


def count_scored() -> list[int]:
    """How many tokens the head is asked for from now on, a number per tile."""
    counts: list[int] = []
    fold = chunked_logprob._forward_tile

    def count(tile: torch.Tensor, *rest: Any, **options: Any) -> None:
        counts.append(len(tile))
        fold(tile, *rest, **options)

    chunked_logprob._forward_tile = count
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


def test_prompts_are_not_scored_and_the_loss_and_its_gradients_are_the_same() -> None:
    labels = torch.full((2, 12), -100)
    labels[0, 9:], labels[1, 4:6] = torch.arange(3), torch.arange(2)
    scored = count_scored()
    whole, gradient = score(labels)
    assert scored == [2 * 11]
    fit_head_to_cpu()
    scored = count_scored()
    short, other = score(labels)
    assert scored == [3 + 2]
    assert short == pytest.approx(whole, rel=1e-6)
    torch.testing.assert_close(other, gradient)


def test_a_batch_without_a_completion_costs_nothing_and_adds_nothing() -> None:
    fit_head_to_cpu()
    scored = count_scored()
    loss, gradient = score(torch.full((2, 12), -100))
    assert (scored, loss) == ([], 0.0)
    assert not gradient.any()


def test_a_large_vocabulary_is_scored_in_small_tiles_to_the_same_loss() -> None:
    labels = torch.arange(24).reshape(2, 12)
    scored = count_scored()
    whole, gradient = score(labels, 2 * CPU_TILE_COLUMNS + 9)
    assert scored == [2 * 11]
    fit_head_to_cpu()
    scored = count_scored()
    tiled, other = score(labels, 2 * CPU_TILE_COLUMNS + 9)
    assert scored == [2 * 11] * 3
    assert tiled == pytest.approx(whole, rel=1e-6)
    torch.testing.assert_close(other, gradient)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"temperature": 0.7, "logit_scale": 0.25}),
        (torch.float32, {"final_logit_softcapping": 3.0}),
        (torch.float32, {"outputs": ("log_probs", *chunked_logprob.OPTIONAL_OUTPUTS)}),
        (torch.float32, {"outputs": ("log_probs",)}),
        (torch.bfloat16, {}),
    ],
)
@pytest.mark.parametrize("trains_entropy", [False, True])
def test_the_folds_are_those_of_trl(dtype: torch.dtype, options: dict[str, Any], trains_entropy: bool) -> None:
    """Every output and gradient, in tiles that hold none, some and all of the targets, and with equal logits."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 8).to(dtype), torch.randn(30, 8).to(dtype)
    weight[7] = weight[3]  # equal logits: the first is the highest
    targets = torch.randint(0, 30, (40,))
    targets[:10] = (hidden[:10].float() @ weight.float().T).argmax(-1)
    targets[10:14] = torch.tensor([3, 7, 0, 29])
    given = {"temperature": 1.0, "logit_scale": 1.0, "final_logit_softcapping": None} | options
    wanted = given.pop("outputs", ("log_probs", "entropy", "is_top1"))

    def compute() -> list[torch.Tensor | None]:
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        found = chunked_logprob.ChunkedLogProbFunction.apply(
            *leaves,
            None,
            targets,
            given["temperature"],
            8,
            given["final_logit_softcapping"],
            given["logit_scale"],
            wanted,
        )
        loss = (found[0] * torch.linspace(0, 1, 40)).sum()
        if trains_entropy and found[1] is not None:
            loss = loss + found[1].sum()
        loss.backward()
        return [*found, *(leaf.grad for leaf in leaves)]

    theirs = compute()
    fit_head_to_cpu()
    for one, other in zip(compute(), theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)
    assert theirs[4] is None or 0 < theirs[4].sum() < 40
