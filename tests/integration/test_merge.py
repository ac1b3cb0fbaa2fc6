"""A merge with the real PEFT, in this process: what was tied and trained apart stays apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

# PEFT warns of what is tested here, and calls what transformers has deprecated.
pytestmark = [
    pytest.mark.train,
    *(pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("UserWarning", "FutureWarning", "DeprecationWarning")),
]


def find_answers(model: Any) -> Any:
    import torch

    torch.manual_seed(3)
    tokens = torch.randint(0, model.config.vocab_size, (2, 40))
    with torch.inference_mode():
        return model.eval()(input_ids=tokens).logits


def test_a_tied_embedding_that_was_trained_apart_stays_apart(tiny: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lora_jobs.spec import ModelSpec
    from lora_jobs.training.merge import merge_adapter

    model = ModelSpec(name_or_path=str(tiny / "models" / "tiny_gemma2"), dtype="float32")
    base = AutoModelForCausalLM.from_pretrained(model.name_or_path)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"],
        init_lora_weights=False,
    )  # fmt: skip
    adapted = get_peft_model(base, config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lm_head.modules_to_save" in name:
                weight.mul_(1.5)
    adapted.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(model.name_or_path).save_pretrained(tmp_path / "adapter")
    wanted = find_answers(adapted)
    answer = merge_adapter(model, tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    assert answer["untied"] is True
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(find_answers(merged), wanted, rtol=1e-4, atol=1e-5)
    half = merge_adapter(model, tmp_path / "adapter", tmp_path / "half", dtype="bfloat16")
    assert (half["dtype"], half["difference"] > answer["difference"]) == ("bfloat16", True)
