"""Earlier traces, one file each: what the libraries' code allocated on fake tensors, without anything of sizing's."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_jobs.runs import write_atomic
from lora_jobs.training.trace.shim import find_cache

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lora_jobs.spec import JobSpec

LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "deepspeed", "bitsandbytes")
_PACKAGE = Path(__file__).parents[2]


def list_sources() -> list[Path]:
    """Our own code that a trace's numbers depend on: tracing, the adapter, the batches, what a spec's values mean."""
    folders = (_PACKAGE / "training" / "trace", _PACKAGE / "spec")
    code = [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix in (".py", ".cpp")]
    return [*code, _PACKAGE / "training" / "model.py", _PACKAGE / "sizing" / "activations.py"]


def find_versions() -> dict[str, str]:
    """Of the libraries that are there."""
    return {name: version(name) for name in LIBRARIES if find_spec(name)}


def trace_key(
    spec: JobSpec, config: Mapping[str, Any], versions: Mapping[str, str], sources: Iterable[Path] | None = None
) -> str:
    """Names a trace: by the job, its model's config, the libraries' versions and the text of `sources`."""
    values = spec.to_values()
    sections = {name: values[name] for name in ("model", "lora", "training", "deepspeed", "resources")}
    batch = [spec.data.max_length, spec.data.pad_to_multiple_of, spec.data.packing, spec.data.eval is not None]
    code = [path.read_text(encoding="utf-8") for path in (list_sources() if sources is None else sources)]
    text = json.dumps([sections, batch, config, versions, code], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def load_trace(key: str) -> dict[str, Any] | None:
    """The values stored under this key, if any are."""
    path = _find_path(key)
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def store_trace(key: str, values: Mapping[str, Any]) -> None:
    path = _find_path(key)
    path.parent.mkdir(exist_ok=True, mode=0o700)
    write_atomic(path, json.dumps(values))


def _find_path(key: str) -> Path:
    return find_cache() / "traces" / f"{key}.json"
