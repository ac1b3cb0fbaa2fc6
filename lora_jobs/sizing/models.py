"""The base models that are known by name: one row each, and what the rows of a family share.

A new model is a row of MODELS; a model that is not here is read from the config.json of its directory.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from lora_jobs.errors import Problem, SpecError


@dataclass(frozen=True, slots=True)
class Family:
    """What every model of one `model_type` of transformers has in common."""

    model_type: str
    norms_per_layer: int
    qk_norm: bool = False
    qkv_bias: bool = False
    attention_soft_cap: bool = False
    final_soft_cap: bool = False
    default_attention: str = "sdpa"
    mask_types: int = 1
    """Attention masks built per step: one, or a full and a sliding one."""
    rope_types: int = 1
    full_attention_every: int = 0
    """Every n-th layer attends in full and the others slide; 0: all layers alike."""


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "gemma2",
            norms_per_layer=4,
            attention_soft_cap=True,
            final_soft_cap=True,
            default_attention="eager",
            mask_types=2,
            full_attention_every=2,
        ),
        Family("gemma3_text", norms_per_layer=4, qk_norm=True, mask_types=2, rope_types=2, full_attention_every=6),
        Family("llama", norms_per_layer=2),
        Family("qwen2", norms_per_layer=2, qkv_bias=True),
        Family("mistral", norms_per_layer=2),
    )
}


@dataclass(frozen=True, slots=True)
class VisionTower:
    """The SigLIP tower of a multimodal checkpoint, by the names of its vision_config; text leaves it idle."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    image_size: int
    patch_size: int


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes that decide a model's parameters and memory, by the names of its config.json."""

    name: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tie_word_embeddings: bool
    max_position_embeddings: int
    source: str
    hub_ids: tuple[str, ...] = ()
    sliding_window: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    vision: VisionTower | None = None

    @property
    def family(self) -> str:
        """Name of the family: transformers' model_type."""
        return self.model_type

    @property
    def traits(self) -> Family:
        """What the whole family has in common."""
        return FAMILIES[self.model_type]

    @property
    def text_path(self) -> str:
        """Where the text model's modules are: a multimodal model has them one level deeper."""
        return "model" if self.vision is None else "model.language_model"

    @property
    def query_size(self) -> int:
        """Outputs of q_proj; not hidden_size everywhere: Gemma 2 9B has 4096 beside 3584."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Outputs of k_proj, and of v_proj."""
        return self.num_key_value_heads * self.head_dim

    @property
    def sliding_layers(self) -> int:
        """Layers with a sliding window."""
        every = self.traits.full_attention_every
        if self.sliding_window is None:
            return 0
        return self.num_hidden_layers - self.num_hidden_layers // every if every else self.num_hidden_layers


def _pair(base: str) -> tuple[str, ...]:
    """Hub ids of a Gemma checkpoint: pretrained and instruct."""
    return (base, f"{base}-it")


_CONFIG = "config.json of the hub repository"

# google/gemma-3-4b-* are multimodal; transformers loads them whole also for text, so they are counted whole.
_VISION_TOWERS = {"gemma-3-4b": VisionTower(1152, 4304, 27, image_size=896, patch_size=14)}

# fmt: off
_ROWS = (
    # name, model_type, vocabulary, hidden, intermediate, layers, heads, key-value heads, head_dim, tied, positions
    ("gemma-2-2b", "gemma2", 256000, 2304, 9216, 26, 8, 4, 256, True, 8192),
    ("gemma-2-9b", "gemma2", 256000, 3584, 14336, 42, 16, 8, 256, True, 8192),
    ("gemma-2-27b", "gemma2", 256000, 4608, 36864, 46, 32, 16, 128, True, 8192),
    ("gemma-3-270m", "gemma3_text", 262144, 640, 2048, 18, 4, 1, 256, True, 32768),
    ("gemma-3-1b", "gemma3_text", 262144, 1152, 6912, 26, 4, 1, 256, True, 32768),
    ("gemma-3-4b", "gemma3_text", 262208, 2560, 10240, 34, 8, 4, 256, True, 131072),
    ("llama-3.1-8b", "llama", 128256, 4096, 14336, 32, 32, 8, 128, False, 131072),
    ("llama-3.2-1b", "llama", 128256, 2048, 8192, 16, 32, 8, 64, True, 131072),
    ("llama-3.2-3b", "llama", 128256, 3072, 8192, 28, 24, 8, 128, True, 131072),
    ("qwen2.5-7b", "qwen2", 152064, 3584, 18944, 28, 28, 4, 128, False, 32768),
    ("mistral-7b-v0.3", "mistral", 32768, 4096, 14336, 32, 32, 8, 128, False, 32768),
    ("smollm2-135m", "llama", 49152, 576, 1536, 30, 9, 3, 64, True, 8192),
)
# fmt: on

_HUB_IDS: dict[str, tuple[str, ...]] = {
    "gemma-2-2b": _pair("google/gemma-2-2b"),
    "gemma-2-9b": _pair("google/gemma-2-9b"),
    "gemma-2-27b": _pair("google/gemma-2-27b"),
    "gemma-3-270m": _pair("google/gemma-3-270m"),
    "gemma-3-1b": ("google/gemma-3-1b-pt", "google/gemma-3-1b-it"),
    "gemma-3-4b": ("google/gemma-3-4b-pt", "google/gemma-3-4b-it"),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"),
    "llama-3.2-1b": ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B-Instruct"),
    "llama-3.2-3b": ("meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.2-3B-Instruct"),
    "qwen2.5-7b": ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct"),
    "mistral-7b-v0.3": ("mistralai/Mistral-7B-v0.3", "mistralai/Mistral-7B-Instruct-v0.3"),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct"),
}

_SLIDING_WINDOWS = {
    "gemma-2-2b": 4096,
    "gemma-2-9b": 4096,
    "gemma-2-27b": 4096,
    "gemma-3-270m": 512,
    "gemma-3-1b": 512,
    "gemma-3-4b": 1024,
}

MODELS: tuple[ModelShape, ...] = tuple(
    ModelShape(
        *row,
        source=_CONFIG,
        hub_ids=_HUB_IDS[row[0]],
        sliding_window=_SLIDING_WINDOWS.get(row[0]),
        vision=_VISION_TOWERS.get(row[0]),
    )
    for row in _ROWS
)

_BY_NAME = {known.lower(): shape for shape in MODELS for known in (shape.name, *shape.hub_ids)}


def find_shape(name_or_path: str) -> ModelShape:
    """The shape of a model: a directory with a config.json, as from_pretrained takes it first; else a row of MODELS."""
    from lora_jobs.sizing.model_config import load_shape

    directory = Path(name_or_path).expanduser()
    try:
        is_directory = directory.is_dir()
    except (OSError, ValueError):
        is_directory = False
    if is_directory:
        return load_shape(directory)
    shape = _BY_NAME.get(name_or_path.lower())
    if shape is None:
        raise _unknown_model(name_or_path)
    return shape


def _unknown_model(name_or_path: str) -> SpecError:
    ids = [hub_id for shape in MODELS for hub_id in shape.hub_ids]
    near = difflib.get_close_matches(name_or_path.lower(), list(_BY_NAME), n=1, cutoff=0.6)
    spelled = {known.lower(): known for known in [*ids, *(shape.name for shape in MODELS)]}
    meant = f"; did you mean {spelled[near[0]]}?" if near else ""
    message = f"unknown model {name_or_path!r}: neither a directory nor a model in the table{meant}"
    return SpecError(
        message,
        problems=[Problem("model.name_or_path", message)],
        hint=(
            "known models: " + ", ".join(shape.name for shape in MODELS) + "; for another one of these families "
            f"({', '.join(FAMILIES)}) give the local directory that holds its config.json"
        ),
    )
