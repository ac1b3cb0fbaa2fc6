"""The base models that are known by name: one row each.

A new model is a row of MODELS; a model that is not here is read from the config.json of its directory.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from msgspec import Struct

from lora_jobs.errors import Problem, SpecError
from lora_jobs.sizing.families import FAMILIES, Family


class VisionTower(Struct, frozen=True):
    """The SigLIP tower of a multimodal checkpoint, by the names of its vision_config; text leaves it idle."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    image_size: int
    patch_size: int


class ModelShape(Struct, frozen=True):
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
    source: str = "config.json"
    hub_ids: tuple[str, ...] = ()
    """The checkpoints of this very shape; `source` is the config.json of each."""
    sliding_window: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    partial_rotary_factor: float = 1.0
    """Share of a head's dimensions that the rotary embedding turns."""
    vision: VisionTower | None = None
    full_layers: int = 0
    """The first layers, which attend in full where the others slide: Qwen's max_window_layers."""

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
    def rotary_dim(self) -> int:
        """Dimensions of a head that the rotary embedding turns."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def sliding_layers(self) -> int:
        """Layers with a sliding window."""
        return sum(self.slides(layer) for layer in range(self.num_hidden_layers))

    def slides(self, layer: int) -> bool:
        """Whether a layer, counted from 0, attends within the sliding window only."""
        every = self.traits.full_attention_every
        in_full = layer < self.full_layers or bool(every and (layer + 1) % every == 0)
        return self.sliding_window is not None and not in_full

    @property
    def mask_types(self) -> int:
        """Attention masks built per step: without a window one."""
        return 1 if self.sliding_window is None else self.traits.mask_types


# Gemma 3 from 4B on is multimodal; transformers loads it whole also for text, so it is counted whole.
_SIGLIP = VisionTower(1152, 4304, 27, image_size=896, patch_size=14)

# fmt: off
MODELS: tuple[ModelShape, ...] = (
    # name, model_type, vocabulary, hidden, intermediate, layers, heads, key-value heads, head_dim, tied, positions
    ModelShape("gemma-2-2b", "gemma2", 256000, 2304, 9216, 26, 8, 4, 256, True, 8192,
               hub_ids=("google/gemma-2-2b", "google/gemma-2-2b-it"), sliding_window=4096),
    ModelShape("gemma-2-9b", "gemma2", 256000, 3584, 14336, 42, 16, 8, 256, True, 8192,
               hub_ids=("google/gemma-2-9b", "google/gemma-2-9b-it"), sliding_window=4096),
    ModelShape("gemma-2-27b", "gemma2", 256000, 4608, 36864, 46, 32, 16, 128, True, 8192,
               hub_ids=("google/gemma-2-27b", "google/gemma-2-27b-it"), sliding_window=4096),
    ModelShape("gemma-3-270m", "gemma3_text", 262144, 640, 2048, 18, 4, 1, 256, True, 32768,
               hub_ids=("google/gemma-3-270m", "google/gemma-3-270m-it"), sliding_window=512),
    ModelShape("gemma-3-1b", "gemma3_text", 262144, 1152, 6912, 26, 4, 1, 256, True, 32768,
               hub_ids=("google/gemma-3-1b-pt", "google/gemma-3-1b-it"), sliding_window=512),
    ModelShape("gemma-3-4b", "gemma3_text", 262208, 2560, 10240, 34, 8, 4, 256, True, 131072,
               hub_ids=("google/gemma-3-4b-pt", "google/gemma-3-4b-it"), sliding_window=1024, vision=_SIGLIP),
    ModelShape("gemma-3-12b", "gemma3_text", 262208, 3840, 15360, 48, 16, 8, 256, True, 131072,
               hub_ids=("google/gemma-3-12b-pt", "google/gemma-3-12b-it"), sliding_window=1024, vision=_SIGLIP),
    ModelShape("gemma-3-27b", "gemma3_text", 262208, 5376, 21504, 62, 32, 16, 128, True, 131072,
               hub_ids=("google/gemma-3-27b-pt", "google/gemma-3-27b-it"), sliding_window=1024, vision=_SIGLIP),
    ModelShape("llama-3.1-8b", "llama", 128256, 4096, 14336, 32, 32, 8, 128, False, 131072,
               hub_ids=("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct")),
    ModelShape("llama-3.2-1b", "llama", 128256, 2048, 8192, 16, 32, 8, 64, True, 131072,
               hub_ids=("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B-Instruct")),
    ModelShape("llama-3.2-3b", "llama", 128256, 3072, 8192, 28, 24, 8, 128, True, 131072,
               hub_ids=("meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.2-3B-Instruct")),
    ModelShape("llama-3.3-70b", "llama", 128256, 8192, 28672, 80, 64, 8, 128, False, 131072,
               hub_ids=("meta-llama/Llama-3.3-70B-Instruct", "meta-llama/Llama-3.1-70B",
                        "meta-llama/Llama-3.1-70B-Instruct")),
    ModelShape("qwen2.5-7b", "qwen2", 152064, 3584, 18944, 28, 28, 4, 128, False, 32768,
               hub_ids=("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct")),
    ModelShape("qwen3-0.6b", "qwen3", 151936, 1024, 3072, 28, 16, 8, 128, True, 40960,
               hub_ids=("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B-Base")),
    ModelShape("qwen3-1.7b", "qwen3", 151936, 2048, 6144, 28, 16, 8, 128, True, 40960,
               hub_ids=("Qwen/Qwen3-1.7B", "Qwen/Qwen3-1.7B-Base")),
    ModelShape("qwen3-4b", "qwen3", 151936, 2560, 9728, 36, 32, 8, 128, True, 40960,
               hub_ids=("Qwen/Qwen3-4B", "Qwen/Qwen3-4B-Base")),
    ModelShape("qwen3-8b", "qwen3", 151936, 4096, 12288, 36, 32, 8, 128, False, 40960,
               hub_ids=("Qwen/Qwen3-8B", "Qwen/Qwen3-8B-Base")),
    ModelShape("qwen3-14b", "qwen3", 151936, 5120, 17408, 40, 40, 8, 128, False, 40960,
               hub_ids=("Qwen/Qwen3-14B", "Qwen/Qwen3-14B-Base")),
    ModelShape("qwen3-32b", "qwen3", 151936, 5120, 25600, 64, 64, 8, 128, False, 40960,
               hub_ids=("Qwen/Qwen3-32B",)),
    ModelShape("phi-3-mini", "phi3", 32064, 3072, 8192, 32, 32, 32, 96, False, 4096,
               hub_ids=("microsoft/Phi-3-mini-4k-instruct",), sliding_window=2047),
    ModelShape("phi-4-mini", "phi3", 200064, 3072, 8192, 32, 24, 8, 128, True, 131072,
               hub_ids=("microsoft/Phi-4-mini-instruct",), sliding_window=262144, partial_rotary_factor=0.75),
    ModelShape("mistral-7b-v0.3", "mistral", 32768, 4096, 14336, 32, 32, 8, 128, False, 32768,
               hub_ids=("mistralai/Mistral-7B-v0.3", "mistralai/Mistral-7B-Instruct-v0.3")),
    ModelShape("mistral-nemo", "mistral", 131072, 5120, 14336, 40, 32, 8, 128, False, 131072,
               hub_ids=("mistralai/Mistral-Nemo-Base-2407", "mistralai/Mistral-Nemo-Instruct-2407")),
    ModelShape("mistral-small-22b", "mistral", 32768, 6144, 16384, 56, 48, 8, 128, False, 32768,
               hub_ids=("mistralai/Mistral-Small-Instruct-2409",)),
    ModelShape("mistral-small-24b", "mistral", 131072, 5120, 32768, 40, 32, 8, 128, False, 32768,
               hub_ids=("mistralai/Mistral-Small-24B-Base-2501", "mistralai/Mistral-Small-24B-Instruct-2501")),
    ModelShape("smollm2-135m", "llama", 49152, 576, 1536, 30, 9, 3, 64, True, 8192,
               hub_ids=("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct")),
    ModelShape("smollm2-360m", "llama", 49152, 960, 2560, 32, 15, 5, 64, True, 8192,
               hub_ids=("HuggingFaceTB/SmolLM2-360M", "HuggingFaceTB/SmolLM2-360M-Instruct")),
    ModelShape("smollm2-1.7b", "llama", 49152, 2048, 8192, 24, 32, 32, 64, True, 8192,
               hub_ids=("HuggingFaceTB/SmolLM2-1.7B", "HuggingFaceTB/SmolLM2-1.7B-Instruct")),
    ModelShape("smollm3-3b", "smollm3", 128256, 2048, 11008, 36, 16, 4, 128, True, 65536,
               hub_ids=("HuggingFaceTB/SmolLM3-3B", "HuggingFaceTB/SmolLM3-3B-Base")),
)
# fmt: on

_BY_NAME = {known.lower(): shape for shape in MODELS for known in (shape.name, *shape.hub_ids)}


class UnknownModelError(SpecError):
    """A model that this table and these families do not hold; a trace of its own code can still size it."""


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
            "lora-jobs models lists those that are known by name; for another one of these families "
            f"({', '.join(FAMILIES)}) give the local directory that holds its config.json"
        ),
    )
