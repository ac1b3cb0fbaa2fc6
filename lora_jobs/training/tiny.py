"""Tiny models with random weights, a tokenizer and chat template, and rows to train them on: for the tests.

They have the real architectures (Gemma 2 soft-caps, and slides its windows; one Gemma 3 has a vision tower) and take
milliseconds a step.
"""

from __future__ import annotations

import json
from itertools import product
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lora_jobs.runs import write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from transformers import PreTrainedModel

VOCABULARY = 512
COLOURS = ("red", "green", "blue", "black", "orange", "purple", "grey", "yellow")
SHAPES = {"circle": 'circle r="{0}"', "square": 'rect width="{0}" height="{0}"', "line": 'path d="M0 0H{0}"'}
SIZES = {"small": 2, "large": 9, "huge": 40}
SIZES_OF_ALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 2,
}
GEMMA = {"head_dim": 16, "sliding_window": 32, "query_pre_attn_scalar": 16, "eos_token_id": [1, 5]}
# Gemma 3's every sixth layer attends in full: here the third of three.
GEMMA_3 = {**GEMMA, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "tiny_gemma2": ("gemma2", GEMMA),
    "tiny_gemma3": ("gemma3_text", GEMMA_3),
    "tiny_gemma3_sees": ("gemma3", GEMMA_3),
    "tiny_llama": ("llama", {"eos_token_id": 1, "tie_word_embeddings": True}),
    "tiny_qwen2": ("qwen2", {"eos_token_id": 1, "tie_word_embeddings": False}),
    "tiny_mistral": ("mistral", {"eos_token_id": 1, "head_dim": 16, "sliding_window": None}),
}
# The tower of a model that also sees: SigLIP's architecture, four patches an image.
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "vision_use_head": False,
}
TURNS = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' }}"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}{{ '\n' + message['content'] | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def build_rows() -> list[dict[str, str]]:
    """72 drawings with their captions, in a fixed order."""
    return [
        {
            "svg": f'<svg viewBox="0 0 50 50"><{SHAPES[shape].format(SIZES[size])} fill="{colour}"/></svg>',
            "caption": f"A {size} {colour} {shape}.",
        }
        for colour, shape, size in product(COLOURS, SHAPES, SIZES)
    ]


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 entries trained on these texts, with Gemma's special tokens and turns."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = TURNS
    return fast


def build_model(name: str = "tiny_gemma2") -> PreTrainedModel:
    """A model of FAMILIES with 3 layers of hidden size 64; the same weights on every call."""
    model_type, options = FAMILIES[name]
    text = {**SIZES_OF_ALL, **options}
    if model_type == "gemma3":
        config = AutoConfig.for_model(model_type, text_config=text, vision_config=TOWER, mm_tokens_per_image=4)
    else:
        config = AutoConfig.for_model(model_type, **text)
    random_state = torch.get_rng_state()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    torch.set_rng_state(random_state)
    return model


def make_tiny(models: Path, data: Path) -> None:
    """Write models/tiny_*, one of each family, and data/tiny/{train,eval,chat,prompt}.jsonl. Takes a second."""
    rows = build_rows()
    tokenizer = build_tokenizer(f"{row['svg']}\n{row['caption']}" for row in rows)
    for name in FAMILIES:
        tokenizer.save_pretrained(models / name)
        build_model(name).save_pretrained(models / name)
    held_out = [row for index, row in enumerate(rows) if index % 9 == 4]
    training = [row for index, row in enumerate(rows) if index % 9 != 4]
    write_rows(data / "tiny" / "train.jsonl", training)
    write_rows(data / "tiny" / "eval.jsonl", held_out)
    write_rows(data / "tiny" / "prompt.jsonl", [{"prompt": r["svg"], "completion": " " + r["caption"]} for r in rows])
    write_rows(data / "tiny" / "text.jsonl", [{"text": row["caption"]} for row in rows])
    chats = [
        [
            {"role": "user", "content": row["svg"]},
            {"role": "assistant", "content": row["caption"]},
            {"role": "user", "content": "Which colour?"},
            {"role": "assistant", "content": row["caption"].split()[2]},
        ]
        for row in rows
    ]
    write_rows(data / "tiny" / "chat.jsonl", [{"messages": chat} for chat in chats])


def write_rows(path: Path, rows: Iterable[object]) -> None:
    """JSON lines, written atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
