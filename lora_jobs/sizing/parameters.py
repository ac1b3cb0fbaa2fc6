"""Exact parameter counts: what the base model has, and what PEFT would train of it."""

from __future__ import annotations

from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from lora_jobs.sizing.modules import HEAD, Module, find_token_embedding, list_modules
from lora_jobs.sizing.patterns import match_fully
from lora_jobs.sizing.targets import find_adapted, find_ranks, spec_error

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_jobs.errors import SpecError
    from lora_jobs.sizing.models import ModelShape
    from lora_jobs.spec.job import LoraSpec

Part = Literal["lora", "saved", "bias", "tokens"]

_EMBEDDING_NAMES = ("embed_tokens", "lm_head")


class TrainableTensor(Struct, frozen=True):
    """One tensor that gets gradients: which part it belongs to, and its elements."""

    module: Module
    part: Part
    elements: int
    rank: int = 0
    """Of an adapter, at its first tensor."""


@lru_cache(maxsize=64)
def count_parameters(shape: ModelShape) -> int:
    """Parameters of the base model; a tied lm_head is the embedding itself and counts once."""
    tied = shape.vocab_size * shape.hidden_size if shape.tie_word_embeddings else 0
    return sum(module.parameters for module in list_modules(shape)) - tied


def count_trainable(shape: ModelShape, lora: LoraSpec) -> int:
    """Parameters that PEFT's get_peft_model would leave trainable."""
    return sum(count_by_part(shape, lora).values())


@lru_cache(maxsize=256)
def count_by_part(shape: ModelShape, lora: LoraSpec) -> Mapping[Part, int]:
    """Trained parameters by what they belong to."""
    counts: dict[Part, int] = {"lora": 0, "saved": 0, "bias": 0, "tokens": 0}
    for tensor in trainable_tensors(shape, lora):
        counts[tensor.part] += tensor.elements
    return MappingProxyType(counts)


@lru_cache(maxsize=256)
def trainable_tensors(shape: ModelShape, lora: LoraSpec) -> tuple[TrainableTensor, ...]:
    """Every tensor that gets gradients, in the order of the modules."""
    targets = find_adapted(shape, lora)
    adapted = _add_tied(shape, targets, lora)
    ranks = find_ranks(lora, adapted)
    adapters = [tensor for module in adapted for tensor in _adapter_tensors(module, lora, ranks[module.name])]
    saved = [
        TrainableTensor(module, "saved", elements)
        for module in saved_modules(shape, lora)
        for elements in (module.weights, module.biases)
        if elements
    ]
    return (*adapters, *saved, *_bias_tensors(shape, targets, lora), *_token_tensors(shape, lora))


@lru_cache(maxsize=256)
def list_adapted_names(shape: ModelShape, lora: LoraSpec) -> frozenset[str]:
    """Full names of the modules that carry an adapter."""
    return frozenset(tensor.module.name for tensor in trainable_tensors(shape, lora) if tensor.part == "lora")


def _adapter_tensors(module: Module, lora: LoraSpec, r: int) -> list[TrainableTensor]:
    """A is r x fan_in, B is fan_out x r; DoRA adds a magnitude per output. Source: LoRA, arXiv:2106.09685; PEFT."""
    sizes = [r * module.fan_in, r * module.fan_out]
    if lora.use_dora:
        sizes.append(module.fan_out)
    return [TrainableTensor(module, "lora", elements, 0 if place else r) for place, elements in enumerate(sizes)]


def _token_tensors(shape: ModelShape, lora: LoraSpec) -> list[TrainableTensor]:
    """The trained rows of the embedding; a tied output layer shares them. Source: PEFT's TrainableTokensLayer."""
    if not lora.trainable_token_indices:
        return []
    embedding, path = find_token_embedding(shape), "lora.trainable_token_indices"
    last = max(lora.trainable_token_indices)
    if last >= shape.vocab_size:
        raise spec_error(
            path,
            f"token {last} is beyond the vocabulary of {shape.name} ({shape.vocab_size} tokens)",
            f"give ids from 0 to {shape.vocab_size - 1}",
        )
    if any(module.is_token_embedding for module in saved_modules(shape, lora)):
        message = f"{embedding.leaf} is in modules_to_save already, which trains every token"
        raise spec_error(path, message, "keep one of trainable_token_indices and modules_to_save")
    tokens = len(set(lora.trainable_token_indices))
    return [TrainableTensor(embedding, "tokens", tokens * shape.hidden_size)]


def _bias_tensors(shape: ModelShape, targets: tuple[Module, ...], lora: LoraSpec) -> list[TrainableTensor]:
    """Biases of the base that PEFT's `bias` unfreezes: all, or those of the adapted layers."""
    modules = {"none": (), "lora_only": targets, "all": list_modules(shape)}[lora.bias]
    return [TrainableTensor(module, "bias", module.biases) for module in modules if module.biases]


def _add_tied(shape: ModelShape, targets: tuple[Module, ...], lora: LoraSpec) -> tuple[Module, ...]:
    """With ensure_weight_tying, an adapter on one of a tied embedding and head puts one on the other too.

    PEFT decides by the bare names, embed_tokens and lm_head, and not where modules_to_save holds one of them.
    """
    if not (shape.tie_word_embeddings and lora.ensure_weight_tying) or set(_EMBEDDING_NAMES) & set(
        lora.modules_to_save
    ):
        return targets
    if isinstance(lora.targets, str):
        named = bool(match_fully(lora.targets, _EMBEDDING_NAMES, path="lora.target_modules"))
    else:
        named = any(target.rsplit(".", 1)[-1] in _EMBEDDING_NAMES for target in lora.targets)
    both = [module for module in list_modules(shape) if module.is_token_embedding or module.name == HEAD]
    return (*targets, *(module for module in both if named and module not in targets))


@lru_cache(maxsize=256)
def saved_modules(shape: ModelShape, lora: LoraSpec) -> tuple[Module, ...]:
    """The modules that modules_to_save trains in full, each as a copy of its own.

    PEFT matches by the end of the name; a tied lm_head gets its own copy unless ensure_weight_tying keeps one.
    """
    chosen: list[Module] = []
    for wanted in lora.modules_to_save:
        found = [module for module in list_modules(shape) if module.name.endswith(wanted)]
        if not found:
            raise _saves_nothing(shape, wanted)
        chosen += [part for module in found for part in _weighted(shape, module) if part not in chosen]
    if shape.tie_word_embeddings and lora.ensure_weight_tying:
        return _keep_tied(shape, chosen)
    return tuple(chosen)


def _weighted(shape: ModelShape, module: Module) -> list[Module]:
    """The modules with weights in `module`: itself, or what a container holds."""
    inside = f"{module.name}."
    return [
        part for part in list_modules(shape) if (part == module or part.name.startswith(inside)) and part.parameters
    ]


def _keep_tied(shape: ModelShape, chosen: list[Module]) -> tuple[Module, ...]:
    """One trained copy for embedding and head, whichever of them is named."""
    others = tuple(module for module in chosen if not (module.is_token_embedding or module.name == HEAD))
    return others if len(others) == len(chosen) else (find_token_embedding(shape), *others)


def _saves_nothing(shape: ModelShape, wanted: str) -> SpecError:
    return spec_error(
        "lora.modules_to_save",
        f"no module of {shape.name} is named {wanted!r}: PEFT would train nothing for it, and not say so",
        f"usual are {', '.join(_EMBEDDING_NAMES)}",
    )
