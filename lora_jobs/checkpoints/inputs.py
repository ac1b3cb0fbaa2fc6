"""What an attempt is trained from, by content: a path may hold other data, or another model, at the next start."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from lora_jobs.checkpoints.manifest import hash_file
from lora_jobs.runs.durable import write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_jobs.runs import Run
    from lora_jobs.spec import JobSpec

# What a tokenizer is made of. Source: transformers' PreTrainedTokenizerBase and PreTrainedTokenizerFast.
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model", "vocab.json")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
# In these of config.json two saves of one model may differ. The rest is the model.
_INCIDENTAL = frozenset({"_name_or_path", "transformers_version", "use_cache"})

# Another model of the same shape differs nearly everywhere, so a large file is told by parts of it: reading tens of
# gigabytes before every start would cost minutes.
WHOLE_BYTES = 64 * 1024**2
SAMPLES = 64
SAMPLE_BYTES = 64 * 1024


def record_inputs(run: Run, attempt: int, spec: JobSpec) -> None:
    """Keep what an attempt starts with, for the checkpoints that it will commit: its spec, and its inputs' content."""
    write_atomic(stored_spec_path(run, attempt), run.spec_path.read_bytes())
    write_atomic(stored_inputs_path(run, attempt), json.dumps(fingerprint_inputs(spec)) + "\n")


def stored_spec_path(run: Run, attempt: int) -> Path:
    """The spec that an attempt started with."""
    return run.directory / f"attempt-{attempt}.spec.yaml"


def stored_inputs_path(run: Run, attempt: int) -> Path:
    """The fingerprints of what an attempt was trained from."""
    return run.directory / f"attempt-{attempt}.inputs.json"


def fingerprint_inputs(spec: JobSpec) -> dict[str, str]:
    """xxh3_128 by key: the training file, and the base model's weights, config and tokenizer.

    What is not on this machine has no key: a data set of the hub, a model that is not in the cache.
    """
    found = {}
    data = Path(spec.data.train)
    if data.is_file():
        found["data.train"] = hash_file(data)
    model = _find_model(spec)
    if model is not None:
        found |= {f"model.{part}": digest for part, digest in _fingerprint_model(model)}
    return found


def _find_model(spec: JobSpec) -> Path | None:
    directory = Path(spec.model.name_or_path)
    if directory.is_dir():
        return directory
    from lora_jobs.spec.hub import find_cache, find_snapshot  # pydantic with it, and a look at the queue needs none

    return find_snapshot(find_cache(os.environ), "model", spec.model.name_or_path, spec.model.revision)


def _fingerprint_model(directory: Path) -> Iterable[tuple[str, str]]:
    weights = sorted({path for pattern in _WEIGHTS for path in directory.glob(pattern)})
    if weights:
        yield "weights", _digest([(path.name, path.stat().st_size, sample_file(path)) for path in weights])
    config = directory / "config.json"
    if config.is_file():
        yield "config", _digest(_read_config(config))
    tokenizer = [(name, hash_file(directory / name)) for name in _TOKENIZER if (directory / name).is_file()]
    if tokenizer:
        yield "tokenizer", _digest(tokenizer)


def _read_config(path: Path) -> Any:
    """What config.json says of the model; its text where it is no JSON, which loading the model then reports."""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        values = json.loads(text)
    except ValueError:
        return text
    return {key: value for key, value in values.items() if key not in _INCIDENTAL} if isinstance(values, dict) else text


def sample_file(path: Path) -> str:
    """xxh3_128 of a file up to 64 MiB; of a larger one of 64 evenly spread parts of 64 KiB, the first and last too."""
    size = path.stat().st_size
    if size <= WHOLE_BYTES:
        return hash_file(path)
    state = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        for number in range(SAMPLES):
            file.seek((size - SAMPLE_BYTES) * number // (SAMPLES - 1))
            state.update(file.read(SAMPLE_BYTES))
    return state.hexdigest()


def _digest(value: Any) -> str:
    return xxhash.xxh3_128(json.dumps(value, sort_keys=True).encode()).hexdigest()
