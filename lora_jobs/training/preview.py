"""`python -m lora_jobs.training.preview`: a spec as JSON on standard input, what its examples become as JSON back.

For `lora-jobs data`: the tokenizer runs in the job's environment, the screen on a login node.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

from lora_jobs.errors import LoraJobsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lora_jobs.spec import DataSpec, JobSpec


def main() -> None:
    """Answer one request: {"spec": values, "rows": most rows to tokenize, "examples": how many to show}."""
    answer_to = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints
    warnings.simplefilter("ignore")
    request = json.loads(sys.stdin.readline())
    from lora_jobs.spec import parse_spec

    spec = parse_spec(json.dumps(request["spec"]), source="spec")
    try:
        answer = preview_data(spec, rows=request["rows"], examples=request["examples"])
    except LoraJobsError as error:
        answer = {"error": error.message, "hint": error.hint}
    json.dump(answer, answer_to)
    answer_to.close()


def preview_data(spec: JobSpec, *, rows: int, examples: int) -> dict[str, Any]:
    """{"train": part, "eval": part or None}; see `preview_part`."""
    from lora_jobs.training.model import load_tokenizer

    tokenizer = load_tokenizer(spec.model)
    return {
        "train": preview_part(spec.data.train, spec.data, tokenizer, rows=rows, examples=examples),
        "eval": None
        if spec.data.eval is None
        else preview_part(spec.data.eval, spec.data, tokenizer, rows=rows, examples=0),
    }


def preview_part(
    name: str, data: DataSpec, tokenizer: PreTrainedTokenizerBase, *, rows: int, examples: int
) -> dict[str, Any]:
    """The first examples in pieces, and the lengths in tokens of the first `rows` rows, what is left out included."""
    from lora_jobs.training.data import IGNORED, read_example
    from lora_jobs.training.splits import iterate_examples

    shown: list[list[dict[str, Any]]] = []
    lengths: list[int] = []
    learned = empty = 0
    more = False
    for number, row in enumerate(iterate_examples(name, data), start=1):
        if number > rows:
            more = True
            break
        ids, labels = read_example(row, number, name, data, tokenizer)
        lengths.append(len(ids))
        counted = sum(label != IGNORED for label in labels[1:])
        learned += counted
        empty += counted == 0
        if len(shown) < examples:
            shown.append(split_pieces(ids, labels, tokenizer))
    return {"name": name, "examples": shown, "lengths": lengths, "learned": learned, "empty": empty, "more": more}


def split_pieces(ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """An example as runs of text with the loss and without: [{"text", "tokens", "learned"}, ...]."""
    from itertools import groupby

    from lora_jobs.training.data import IGNORED

    pairs = zip(ids, labels, strict=True)
    groups = [(on, [token for token, _ in run]) for on, run in groupby(pairs, key=lambda pair: pair[1] != IGNORED)]
    return [{"text": tokenizer.decode(run), "tokens": len(run), "learned": on} for on, run in groups]


if __name__ == "__main__":
    main()
