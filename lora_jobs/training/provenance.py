"""What a checkpoint was trained from, in hashes: the spec, the base model, the tokenizer, the examples."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import xxhash

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedTokenizerBase, TrainingArguments

    from lora_jobs.runs import Run
    from lora_jobs.spec import ModelSpec
    from lora_jobs.training.data import Examples

ROWS_AT_ONCE = 1000


def describe_inputs(
    run: Run,
    model: ModelSpec,
    args: TrainingArguments,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    train: Examples,
) -> dict[str, Any]:
    """The part of a manifest's metadata that says whether a checkpoint belongs to a spec. Hashes are xxh3_128."""
    micro_batch = args.per_device_train_batch_size
    return {
        "spec": xxhash.xxh3_128(run.spec_path.read_bytes()).hexdigest(),
        "batch": {
            "per_device_train_batch_size": micro_batch,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "global": micro_batch * args.gradient_accumulation_steps * args.world_size,
        },
        "model": {
            "name_or_path": model.name_or_path,
            "revision": model.revision,
            "commit": getattr(config, "_commit_hash", None),
            "config": hash_config(config),
            "tokenizer": hash_tokenizer(tokenizer),
        },
        "data": {"examples": len(train.dataset), "hash": hash_examples(train.dataset)},
    }


def hash_config(config: PretrainedConfig) -> str:
    """The model's config.json; not the path that it was loaded from, nor the version that loaded it."""
    values = {key: value for key, value in config.to_dict().items() if key not in _INCIDENTAL}
    return xxhash.xxh3_128(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


_INCIDENTAL = frozenset({"_name_or_path", "transformers_version", "use_cache", "quantization_config"})


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Vocabulary, rules and chat template of a fast tokenizer; not what the last call set for padding and cutting."""
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = {key: value for key, value in values.items() if key not in {"padding", "truncation"}}
    text = json.dumps([rules, tokenizer.chat_template], sort_keys=True)
    return xxhash.xxh3_128(text.encode()).hexdigest()


def hash_examples(dataset: Dataset) -> str:
    """Every value of every row, in order: the same rows have the same hash, however the table is cut in memory."""
    state = xxhash.xxh3_128()
    for table in dataset.with_format("arrow").iter(batch_size=ROWS_AT_ONCE):
        for name in sorted(table.column_names):
            state.update(f"{name}\n".encode())
            column = table[name].combine_chunks()
            while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
                state.update(column.value_lengths().to_numpy(zero_copy_only=False).tobytes())
                column = column.flatten()
            state.update(_to_bytes(column))
    return state.hexdigest()


def _to_bytes(column: pa.Array) -> bytes:
    number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    if number and column.null_count == 0:
        return bytes(column.to_numpy(zero_copy_only=False).tobytes())
    return json.dumps(column.to_pylist(), default=str).encode()
