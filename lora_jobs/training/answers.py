"""Greedy answers of a model to a prompt of token ids."""

from __future__ import annotations

from typing import Any

import torch


@torch.no_grad()
def generate(
    model: Any, prompt: list[int], tokenizer: Any, *, max_new_tokens: int, no_repeat_ngram_size: int = 0
) -> str:
    """The greedy continuation of a prompt, without special tokens."""
    ids = torch.tensor([prompt], device=model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        no_repeat_ngram_size=no_repeat_ngram_size,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    return str(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)).strip()
