"""Rows of the spec's files or splits -> token ids and labels; the same for both trainers.

Tokenizing here, and not in the trainer, gives one rule for every format: what counts for the loss are the tokens that
carry characters of a completion, nothing is cut, and what does not fit is counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datasets import Dataset
from jinja2.exceptions import TemplateError
from msgspec import Struct

from lora_jobs.errors import SpecError
from lora_jobs.training.splits import iterate_examples

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from lora_jobs.spec import DataSpec

IGNORED = -100
SVG_INSTRUCTION = (
    "You know SVG very well. Read the SVG code below and tell, accurately and in detail, what picture it draws."
)


class Rendered(Struct, frozen=True):
    """A row as text, and the character ranges that the model is to learn. `special`: add the start token."""

    text: str
    spans: tuple[tuple[int, int], ...]
    special: bool


class Examples(Struct, frozen=True):
    """A tokenized file. `too_long` and `empty` rows are left out, never cut: they are counted for the run's notes."""

    dataset: Dataset
    total: int
    too_long: int
    empty: int


def load_examples(path: str, data: DataSpec, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Tokenize one file or split. Errors: SpecError for a row the chat template refuses, or when no row is left."""
    kept: list[dict[str, list[int]]] = []
    total = too_long = empty = 0
    for number, row in enumerate(iterate_examples(path, data), start=1):
        total += 1
        ids, labels = read_example(row, number, path, data, tokenizer)
        if len(ids) > data.max_length:
            too_long += 1
        elif all(label == IGNORED for label in labels[1:]):
            empty += 1
        else:
            kept.append({"input_ids": ids, "labels": labels})
    if not kept:
        raise SpecError(
            f"{path}: none of {total} examples can be used: {too_long} are longer than data.max_length "
            f"{data.max_length} tokens, {empty} have no completion",
            hint="raise data.max_length, or look at the rows",
        )
    return Examples(Dataset.from_list(kept), total, too_long, empty)


def read_example(
    row: Mapping[str, Any], number: int, path: str, data: DataSpec, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Token ids and labels of one row. Errors: SpecError where the row cannot become an example of the format."""
    try:
        return tokenize(render_row(row, data, tokenizer), data, tokenizer)
    except (TemplateError, KeyError, TypeError) as error:
        raise SpecError(f"{path}, row {number}: cannot become a {data.format} example: {error}") from error


def tokenize(rendered: Rendered, data: DataSpec, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids and labels; a token counts for the loss when it carries a character of a span."""
    encoded = tokenizer(rendered.text, add_special_tokens=rendered.special, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    if not data.completion_only:
        return ids, list(ids)
    labels = [
        token if any(start < last and end > first for first, last in rendered.spans) else IGNORED
        for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    return ids, labels


def render_row(row: Mapping[str, Any], data: DataSpec, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """A row as the text that the model sees. Plain formats end with the end token, chats as the template says."""
    match data.format:
        case "text":
            text = close(row["text"], tokenizer)
            return Rendered(text, ((0, len(text)),), special=True)
        case "prompt_completion":
            prompt, text = row["prompt"], close(row["prompt"] + row["completion"], tokenizer)
            return Rendered(text, ((len(prompt), len(text)),), special=True)
        case "chat":
            return render_chat(row["messages"], tokenizer)
        case "svg_caption":
            return render_chat(build_svg_messages(row["svg"], row["caption"], data.instruction), tokenizer)


def close(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Text with the end token, once, so that the model learns to stop."""
    end = tokenizer.eos_token or ""
    return text if end and text.endswith(end) else text + end


def build_svg_messages(svg: str, caption: str, instruction: str | None) -> list[dict[str, str]]:
    """One user turn with the SVG, one model turn with its caption."""
    question = f"{instruction or SVG_INSTRUCTION}\n\n{svg}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": caption}]


def render_chat(messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """A conversation by the model's own template; every turn of the assistant (or "model") is a span, end mark too.

    Errors: SpecError without a template, or where the template writes earlier turns differently once more follow.
    """
    if not tokenizer.chat_template:
        raise SpecError(
            "data.format: this model's tokenizer has no chat template", hint="use data.format: prompt_completion"
        )
    turns = list(messages)
    text = apply_template(turns, tokenizer)
    spans = []
    for index, turn in enumerate(turns):
        if turn["role"] not in ("assistant", "model"):
            continue
        before = apply_template(turns[:index], tokenizer, ask=True)
        through = apply_template(turns[: index + 1], tokenizer)
        if not (through.startswith(before) and text.startswith(through)):
            raise SpecError(
                f"data.format: the model's chat template writes turn {index + 1} differently when more follow, "
                "so its tokens cannot be told apart",
                hint="train on single turns, or write prompt and completion yourself (data.format: prompt_completion)",
            )
        spans.append((len(before), len(through)))
    return Rendered(text, tuple(spans), special=False)


def apply_template(
    messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase, *, ask: bool = False
) -> str:
    """The conversation as text; with `ask` up to where the model begins to answer."""
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask))


def take_prompt(example: Mapping[str, list[int]]) -> tuple[list[int], list[int]]:
    """Token ids of an example before and from its first label: what is asked, and the answer it has."""
    labels = example["labels"]
    first = next(index for index, label in enumerate(labels) if label != IGNORED)
    return example["input_ids"][:first], [label for label in labels[first:] if label != IGNORED]
