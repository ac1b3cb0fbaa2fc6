"""The shape of a model from the config.json of a local directory, for the families of transformers that are known."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lora_jobs.errors import Problem, SpecError
from lora_jobs.sizing.families import FAMILIES
from lora_jobs.sizing.models import ModelShape, UnknownModelError, VisionTower

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MAX_CONFIG_BYTES = 1024**2

# The largest value that is taken for real; a larger one is a slip or an attack on whoever computes with it.
_LIMITS = {
    "vocab_size": 10_000_000,
    "hidden_size": 1_000_000,
    "intermediate_size": 10_000_000,
    "num_hidden_layers": 1_000,
    "num_attention_heads": 10_000,
    "num_key_value_heads": 10_000,
    "head_dim": 100_000,
    "max_position_embeddings": 1_000_000_000,
    "sliding_window": 1_000_000_000,
    "image_size": 100_000,
    "patch_size": 10_000,
}

# What the config classes of transformers 5.23 put where a key is left out (the hub's own files leave keys out);
# a callable takes the values before it; a key that is in neither row is required.
_Default = int | None | bool | str
_COMMON: dict[str, Any] = {
    "num_key_value_heads": lambda values: values["num_attention_heads"],
    "head_dim": lambda values: _even_share(values["hidden_size"], values["num_attention_heads"]),
    "sliding_window": None,
    "attention_bias": False,
    "mlp_bias": False,
}


def _even_share(hidden: int, heads: int) -> int:
    """hidden / heads; 0, which is refused, where that is not a whole number."""
    return 0 if hidden % heads else hidden // heads


_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma2": {
        "vocab_size": 256000, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192,
        "sliding_window": 4096, "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "max_position_embeddings": 131072, "sliding_window": 4096, "tie_word_embeddings": True,
    },
    "llama": {"max_position_embeddings": 2048, "tie_word_embeddings": False},
    "qwen2": {"max_position_embeddings": 32768, "sliding_window": 4096, "tie_word_embeddings": False},
    "qwen3": {
        "head_dim": 128, "max_position_embeddings": 32768, "sliding_window": 4096, "tie_word_embeddings": False,
    },
    "phi3": {"vocab_size": 32064, "max_position_embeddings": 4096, "tie_word_embeddings": False},
    "smollm3": {
        "vocab_size": 128256, "num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": True,
    },
    "mistral": {
        "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
_VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "image_size": 224,
    "patch_size": 16,
}
_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window",
)  # fmt: skip
_WINDOW_BY_SWITCH = ("qwen2", "qwen3", "smollm3")
"""Families with a sliding_window in their configs that only use_sliding_window turns on."""

_FULL_LAYERS = {"qwen2": 28, "qwen3": 28}
"""max_window_layers where it is left out: the layers before the first that slides."""

_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias")


def load_shape(directory: Path) -> ModelShape:
    """The shape in `directory`/config.json; SpecError names the key, what it is and what was wanted."""
    path = directory / "config.json"
    config = _load_json(path)
    if "quantization_config" in config:
        raise _error(path, "the checkpoint is quantized already (quantization_config): give the original weights")
    config, vision = _text_part(config, path)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise _unknown(path, f"model_type is {model_type!r}, wanted one of {', '.join(FAMILIES)}")
    values = _read_values(config, model_type, path)
    _verify_shape(values, path)
    return ModelShape(
        name=directory.resolve().name,
        model_type=model_type,
        source=str(path),
        vision=vision,
        partial_rotary_factor=_read_rotary_factor(config, path),
        **values,
    )


def _load_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except FileNotFoundError as error:
        raise _error(path, "is missing: not the directory of a transformers model") from error
    except OSError as error:
        raise _error(path, f"cannot be read: {error.strerror}") from error
    if len(raw) > MAX_CONFIG_BYTES:
        raise _error(path, f"is larger than {MAX_CONFIG_BYTES} bytes: not a config.json")
    try:
        config = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise _error(path, f"is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise _error(path, f"holds a {type(config).__name__}, wanted an object with model_type")
    return config


def _text_part(config: dict[str, Any], path: Path) -> tuple[dict[str, Any], VisionTower | None]:
    """The text model's config, and the vision tower of a multimodal one (Gemma 3 from 4B on nests the two)."""
    if config.get("model_type") != "gemma3":
        return config, None
    text, vision = config.get("text_config"), config.get("vision_config")
    if not isinstance(text, dict) or not isinstance(vision, dict):
        raise _error(path, "model_type is 'gemma3' but text_config or vision_config is missing")
    if vision.get("vision_use_head", True):
        raise _unknown(path, "vision_config.vision_use_head is true: the size of that head is not known here")
    sizes = {key: _read_count(key, vision.get(key, default), path) for key, default in _VISION_DEFAULTS.items()}
    return {**text, "model_type": "gemma3_text"}, VisionTower(**sizes)


def _read_values(config: dict[str, Any], model_type: str, path: Path) -> dict[str, Any]:
    defaults = {**_COMMON, **_DEFAULTS[model_type]}
    values: dict[str, Any] = {}
    for key in _COUNTS:
        value = _present(config, key, defaults, values, path)
        no_window = key == "sliding_window" and value is None
        if key == "head_dim" and value == 0:
            hidden, heads = values["hidden_size"], values["num_attention_heads"]
            raise _error(path, f"hidden_size ({hidden}) is not a multiple of num_attention_heads ({heads})")
        values[key] = None if no_window else _read_count(key, value, path)
    for key in _FLAGS:
        values[key] = _present(config, key, defaults, values, path)
        if not isinstance(values[key], bool):
            raise _error(path, f"{key} is {values[key]!r}, wanted true or false")
    if model_type in _WINDOW_BY_SWITCH and values["sliding_window"] is not None:
        values |= _read_window(config, model_type, values, path)
    return values


def _read_window(config: dict[str, Any], model_type: str, values: dict[str, Any], path: Path) -> dict[str, Any]:
    """The window that use_sliding_window turns on, and the layers before those that slide."""
    if not config.get("use_sliding_window"):
        return {"sliding_window": None}
    if model_type not in _FULL_LAYERS:
        raise _unknown(path, "use_sliding_window is true: which layers slide is not known here for this family")
    layers, full = values["num_hidden_layers"], config.get("max_window_layers", _FULL_LAYERS[model_type])
    if not isinstance(full, int) or isinstance(full, bool) or full < 0:
        raise _error(path, f"max_window_layers is {full!r}, wanted a whole number from 0")
    kinds = ["full_attention" if layer < full else "sliding_attention" for layer in range(layers)]
    if config.get("layer_types") not in (None, kinds):
        raise _unknown(path, f"layer_types is not what max_window_layers ({full}) says: other layers slide")
    return {"full_layers": full} if full < layers else {"sliding_window": None}


def _read_rotary_factor(config: dict[str, Any], path: Path) -> float:
    """Share of a head that is rotated: beside the other keys, or within rope_parameters."""
    ropes = config.get("rope_parameters")
    nested = ropes.get("partial_rotary_factor") if isinstance(ropes, dict) else None
    factor = config.get("partial_rotary_factor", nested)
    if factor is None:
        return 1.0
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not 0 < factor <= 1:
        raise _error(path, f"partial_rotary_factor is {factor!r}, wanted a number above 0, at most 1")
    return float(factor)


def _present(config: dict[str, Any], key: str, defaults: dict[str, Any], values: dict[str, Any], path: Path) -> Any:
    value = config.get(key)
    if value is None and (key != "sliding_window" or key not in config):
        if key not in defaults:
            raise _error(path, f"{key} is missing")
        default: Callable[[dict[str, Any]], Any] | _Default = defaults[key]
        return default(values) if callable(default) else default
    return value


def _read_count(key: str, value: Any, path: Path) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LIMITS[key]:
        raise _error(path, f"{key} is {value!r}, wanted a whole number from 1 to {_LIMITS[key]:,}")
    return value


def _verify_shape(values: dict[str, Any], path: Path) -> None:
    if values["head_dim"] % 2:
        raise _error(path, f"head_dim is {values['head_dim']}: rotary embeddings need an even one")
    heads, groups = values["num_attention_heads"], values["num_key_value_heads"]
    if heads % groups:
        raise _error(path, f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({groups})")


def _unknown(path: Path, what: str) -> UnknownModelError:
    message = f"{path}: {what}"
    return UnknownModelError(
        message,
        problems=[Problem("model.name_or_path", message)],
        hint="check --exact traces any causal model of transformers, in the job's environment",
    )


def _error(path: Path, what: str) -> SpecError:
    message = f"{path}: {what}"
    return SpecError(
        message,
        problems=[Problem("model.name_or_path", message)],
        hint=f"model.name_or_path wants a model of one of these families: {', '.join(FAMILIES)}",
    )
