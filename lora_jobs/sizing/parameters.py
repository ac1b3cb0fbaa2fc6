"""Exact parameter counts: what the base model has, and what PEFT would train of it."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from lora_jobs.errors import Problem, SpecError
from lora_jobs.sizing.modules import HEAD, Module, find_token_embedding, list_modules

if TYPE_CHECKING:
    from lora_jobs.sizing.models import ModelShape
    from lora_jobs.spec.job import LoraSpec

Part = Literal["lora", "saved", "bias"]

ALL_LINEAR = "all-linear"
_EMBEDDING_NAMES = ("embed_tokens", "lm_head")


@dataclass(frozen=True, slots=True)
class TrainableTensor:
    """One tensor that gets gradients: which part it belongs to, and its elements."""

    module: Module
    part: Part
    elements: int


def count_parameters(shape: ModelShape) -> int:
    """Parameters of the base model; a tied lm_head is the embedding itself and counts once."""
    tied = shape.vocab_size * shape.hidden_size if shape.tie_word_embeddings else 0
    return sum(module.parameters for module in list_modules(shape)) - tied


def count_trainable(shape: ModelShape, lora: LoraSpec) -> int:
    """Parameters that PEFT's get_peft_model would leave trainable."""
    return sum(tensor.elements for tensor in trainable_tensors(shape, lora))


def match_targets(shape: ModelShape, target_modules: tuple[str, ...] | str) -> tuple[Module, ...]:
    """The modules that get an adapter, as PEFT matches: a list by name or dotted ending, a string by re.fullmatch
    over full names, "all-linear" for every linear layer but the output. SpecError where nothing, or a module that
    cannot carry one, is matched.
    """
    return _match(shape, target_modules, ())


def count_targets(shape: ModelShape, lora: LoraSpec) -> dict[str, int]:
    """How many layers of each name get an adapter, such as {"q_proj": 26}."""
    return dict(Counter(module.leaf for module in adapted_modules(shape, lora)))


def adapted_modules(shape: ModelShape, lora: LoraSpec) -> tuple[Module, ...]:
    """The modules that get an adapter: target_modules less what the other fields leave out."""
    return _match(shape, lora.targets, lora.modules_to_save, lora)


def _match(
    shape: ModelShape,
    target_modules: tuple[str, ...] | str,
    modules_to_save: tuple[str, ...],
    lora: LoraSpec | None = None,
) -> tuple[Module, ...]:
    candidates = [module for module in list_modules(shape) if not _is_saved(module.name, modules_to_save)]
    if lora is not None:
        candidates = [module for module in candidates if not _is_left_out(module, lora)]
    matched = [module for module in candidates if _is_target(module, target_modules)]
    if not matched:
        raise _matches_nothing(shape, target_modules, modules_to_save)
    unfit = [module.name for module in matched if module.kind not in ("linear", "embedding")]
    if unfit:
        raise _error(
            "lora.target_modules",
            f"target_modules also matches {unfit[0]}, which is not a linear layer or an embedding: not adapted here",
            f"for every linear layer write {ALL_LINEAR}, or name them: {', '.join(_linear_names(shape))}",
        )
    return tuple(matched)


def _is_target(module: Module, target_modules: tuple[str, ...] | str) -> bool:
    if not isinstance(target_modules, str):
        return any(module.name == target or module.name.endswith(f".{target}") for target in target_modules)
    if target_modules.lower() == ALL_LINEAR:
        return module.kind == "linear" and module.name != HEAD
    return re.fullmatch(target_modules, module.name) is not None


def _is_left_out(module: Module, lora: LoraSpec) -> bool:
    """exclude_modules by name or regular expression, and every layer but those of layers_to_transform."""
    if lora.layers_to_transform and module.layer not in lora.layers_to_transform:
        return True
    return bool(lora.exclude_modules) and _is_target(module, lora.exclude_modules)


def _is_saved(name: str, modules_to_save: tuple[str, ...]) -> bool:
    """PEFT puts no adapter on (or in) a module of modules_to_save."""
    return any(re.match(rf"(^|.*\.){re.escape(saved)}($|\..*)", name) for saved in modules_to_save)


@lru_cache(maxsize=256)
def trainable_tensors(shape: ModelShape, lora: LoraSpec) -> tuple[TrainableTensor, ...]:
    """Every tensor that gets gradients, in the order of the modules."""
    targets = adapted_modules(shape, lora)
    _verify_rank(targets, lora.r)
    adapted = _add_tied(shape, targets, lora)
    adapters = [tensor for module in adapted for tensor in _adapter_tensors(module, lora)]
    saved = [
        TrainableTensor(module, "saved", elements)
        for module in saved_modules(shape, lora)
        for elements in (module.weights, module.biases)
        if elements
    ]
    return (*adapters, *saved, *_bias_tensors(shape, targets, lora))


def _adapter_tensors(module: Module, lora: LoraSpec) -> list[TrainableTensor]:
    """A is r x fan_in, B is fan_out x r; DoRA adds a magnitude per output. Source: LoRA, arXiv:2106.09685; PEFT."""
    sizes = [lora.r * module.fan_in, lora.r * module.fan_out]
    if lora.use_dora:
        sizes.append(module.fan_out)
    return [TrainableTensor(module, "lora", elements) for elements in sizes]


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
        pattern = lora.targets
        named = any(re.fullmatch(pattern, name) for name in _EMBEDDING_NAMES)
    else:
        named = any(target.rsplit(".", 1)[-1] in _EMBEDDING_NAMES for target in lora.targets)
    both = [module for module in list_modules(shape) if module.is_token_embedding or module.name == HEAD]
    return (*targets, *(module for module in both if named and module not in targets))


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


def _verify_rank(targets: tuple[Module, ...], r: int) -> None:
    smallest = min(targets, key=lambda module: min(module.fan_in, module.fan_out))
    limit = min(smallest.fan_in, smallest.fan_out)
    if r > limit:
        raise _error(
            "lora.r",
            f"r is {r}, larger than the smallest side of {smallest.name} ({smallest.fan_in} x {smallest.fan_out})",
            f"choose r of at most {limit}; common values are 8 to 128",
        )


def _linear_names(shape: ModelShape) -> list[str]:
    return list(dict.fromkeys(module.leaf for module in list_modules(shape) if module.kind == "linear"))


def _matches_nothing(
    shape: ModelShape, target_modules: tuple[str, ...] | str, modules_to_save: tuple[str, ...]
) -> SpecError:
    names = _linear_names(shape)
    if isinstance(target_modules, str):
        example = f"{shape.text_path}.layers.0.self_attn.q_proj"
        hint = (
            f"a string is one regular expression over full names such as {example}; the names end in {', '.join(names)}"
        )
        return _error(
            "lora.target_modules", f"no layer of {shape.name} matches target_modules {target_modules!r}", hint
        )
    near = [match for target in target_modules for match in difflib.get_close_matches(target, names, n=1)]
    meant = f"; did you mean {', '.join(dict.fromkeys(near))}?" if near and not modules_to_save else ""
    message = f"no layer of {shape.name} is named {', '.join(target_modules)}{meant}"
    if modules_to_save:
        message += f" (layers in modules_to_save, {', '.join(modules_to_save)}, get no adapter)"
    return _error("lora.target_modules", message, f"its layers are {', '.join(names)}")


def _saves_nothing(shape: ModelShape, wanted: str) -> SpecError:
    return _error(
        "lora.modules_to_save",
        f"no module of {shape.name} is named {wanted!r}: PEFT would train nothing for it, and not say so",
        f"usual are {', '.join(_EMBEDDING_NAMES)}",
    )


def _error(path: str, message: str, hint: str) -> SpecError:
    return SpecError(message, problems=[Problem(path, message)], hint=hint)
