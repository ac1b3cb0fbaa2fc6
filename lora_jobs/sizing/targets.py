"""Which modules get an adapter, and of which rank, as PEFT resolves target_modules and rank_pattern."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING

from lora_jobs.errors import Problem, SpecError
from lora_jobs.sizing.modules import HEAD, Module, list_modules
from lora_jobs.sizing.patterns import match_endings, match_fully, split_alternatives
from lora_jobs.spec import translate_targets
from lora_jobs.spec.job import DEFAULT_TARGETS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lora_jobs.sizing.models import ModelShape
    from lora_jobs.spec.job import LoraSpec

ALL_LINEAR = "all-linear"


@lru_cache(maxsize=64)  # the changes that are tried on a job leave its targets alone
def match_targets(
    shape: ModelShape, target_modules: tuple[str, ...] | str, modules_to_save: tuple[str, ...] = ()
) -> tuple[Module, ...]:
    """The modules that get an adapter: a list by name or dotted ending, a string by re.fullmatch over full names,
    "all-linear" for every linear layer but the output; none in modules_to_save.

    Errors: SpecError where nothing is matched, or a name of the list, or a module that cannot carry an adapter is.
    """
    candidates = _leave_saved(list_modules(shape), modules_to_save)
    matched = _find_matches(candidates, target_modules)
    if not matched:
        raise _matches_nothing(shape, target_modules, modules_to_save)
    if not isinstance(target_modules, str) and target_modules != DEFAULT_TARGETS:
        _verify_names(shape, target_modules)
    unfit = [module.name for module in matched if module.kind not in ("linear", "embedding")]
    if unfit:
        raise spec_error(
            "lora.target_modules",
            f"target_modules also matches {unfit[0]}, which is not a linear layer or an embedding: not adapted here",
            f"for every linear layer write {ALL_LINEAR}, or name them: {', '.join(linear_names(shape))}",
        )
    return matched


def find_adapted(shape: ModelShape, lora: LoraSpec) -> tuple[Module, ...]:
    """The modules that get an adapter by all fields together: target_modules less what the others leave out.

    Errors: those of `match_targets`; SpecError where nothing is left.
    """
    targets = match_targets(shape, lora.targets, lora.modules_to_save)
    excluded = _find_matches(targets, lora.exclude_modules) if lora.exclude_modules else ()
    wanted = set(lora.layers_to_transform)
    left = tuple(module for module in targets if module not in excluded and (not wanted or _number(module) in wanted))
    if left:
        return left
    path = "lora.layers_to_transform" if wanted else "lora.exclude_modules"
    message = f"leaves none of the {len(targets)} layers that target_modules names"
    raise spec_error(path, message, f"{shape.name} has the layers 0 to {shape.num_hidden_layers - 1}")


@lru_cache(maxsize=64)
def find_dead_alternatives(shape: ModelShape, target_modules: tuple[str, ...] | str) -> tuple[str, ...]:
    """The outermost alternatives of a regular expression that no module's name matches, as they are written."""
    if not isinstance(target_modules, str) or target_modules.lower() == ALL_LINEAR:
        return ()
    names = [module.name for module in list_modules(shape)]
    parts = [(part, str(translate_targets(part))) for part in split_alternatives(target_modules)]
    return tuple(part for part, translated in parts if not match_fully(translated, names, path="lora.target_modules"))


def _number(module: Module) -> int | None:
    """Number of the layer that a module is in, in a vision tower too: PEFT reads it off the name."""
    found = re.match(r".*\.(\d+)\.", module.name)
    return int(found[1]) if found else None


def count_targets(shape: ModelShape, lora: LoraSpec) -> dict[str, int]:
    """How many layers of each name get an adapter, such as {"q_proj": 26}."""
    return dict(Counter(module.leaf for module in find_adapted(shape, lora)))


def _find_matches(candidates: Sequence[Module], target_modules: tuple[str, ...] | str) -> tuple[Module, ...]:
    if not isinstance(target_modules, str):
        endings = tuple(f".{name}" for name in target_modules)
        return tuple(module for module in candidates if module.name in target_modules or module.name.endswith(endings))
    if target_modules.lower() == ALL_LINEAR:
        return tuple(module for module in candidates if module.kind == "linear" and module.name != HEAD)
    names = match_fully(target_modules, [module.name for module in candidates], path="lora.target_modules")
    return tuple(module for module in candidates if module.name in names)


def _leave_saved(modules: Iterable[Module], modules_to_save: tuple[str, ...]) -> list[Module]:
    """Without the modules of modules_to_save and what is in them: PEFT puts no adapter there."""
    names = "|".join(re.escape(saved) for saved in modules_to_save)
    saved = re.compile(rf"(^|.*\.)({names})($|\..*)")
    return [module for module in modules if not (names and saved.match(module.name))]


def find_ranks(lora: LoraSpec, targets: tuple[Module, ...]) -> dict[str, int]:
    """The rank of every adapted module, by its name: the first key of rank_pattern that it ends in, else r.

    Errors: SpecError for a key that matches no adapted module, and for a rank beyond a module's smaller side.
    """
    names = [module.name for module in targets]
    matches = {key: match_endings(key, names, path=f"lora.rank_pattern.{key}") for key in (*lora.rank_pattern,)}
    for section, keys in (("rank_pattern", matches), ("alpha_pattern", _match_alphas(lora, names))):
        for key, found in keys.items():
            if not found:
                raise _matches_no_adapter(targets, f"lora.{section}.{key}", key)
    ranks = {
        name: next((lora.rank_pattern[key] for key, found in matches.items() if name in found), lora.r)
        for name in names
    }
    for module in targets:
        _verify_rank(module, ranks[module.name], "lora.r" if ranks[module.name] == lora.r else "lora.rank_pattern")
    return ranks


def _match_alphas(lora: LoraSpec, names: list[str]) -> dict[str, frozenset[str]]:
    return {key: match_endings(key, names, path=f"lora.alpha_pattern.{key}") for key in lora.alpha_pattern}


def _verify_rank(module: Module, r: int, path: str) -> None:
    limit = min(module.fan_in, module.fan_out)
    if r > limit:
        raise spec_error(
            path,
            f"r is {r}, larger than the smallest side of {module.name} ({module.fan_in} x {module.fan_out})",
            f"choose r of at most {limit}; common values are 8 to 128",
        )


def _verify_names(shape: ModelShape, names: tuple[str, ...]) -> None:
    """PEFT drops a name that nothing matches without a word, as long as another one matches."""
    for name in names:
        if not _find_matches(list_modules(shape), (name,)):
            raise _matches_nothing(shape, (name,), ())


def linear_names(shape: ModelShape) -> list[str]:
    """The last parts of the names that an adapter can be put on."""
    return list(dict.fromkeys(module.leaf for module in list_modules(shape) if module.kind == "linear"))


def _matches_nothing(
    shape: ModelShape, target_modules: tuple[str, ...] | str, modules_to_save: tuple[str, ...]
) -> SpecError:
    names = linear_names(shape)
    if isinstance(target_modules, str):
        example = f"{shape.text_path}.layers.0.self_attn.o_proj"
        hint = (
            f"a string is one regular expression over full names such as {example}; the names end in {', '.join(names)}"
        )
        return spec_error(
            "lora.target_modules", f"no layer of {shape.name} matches target_modules {target_modules!r}", hint
        )
    adaptable = [name for name in names if name not in modules_to_save]
    near = [match for target in target_modules for match in difflib.get_close_matches(target, adaptable, n=1)]
    meant = f"; did you mean {', '.join(dict.fromkeys(near))}?" if near else ""
    message = f"no layer of {shape.name} is named {', '.join(target_modules)}{meant}"
    if modules_to_save:
        message += f" (layers in modules_to_save, {', '.join(modules_to_save)}, get no adapter)"
    return spec_error("lora.target_modules", message, f"its layers are {', '.join(names)}")


def _matches_no_adapter(targets: tuple[Module, ...], path: str, key: str) -> SpecError:
    names = dict.fromkeys(module.leaf for module in targets)
    return spec_error(
        path, f"{key!r} matches no adapted layer: PEFT would ignore it", f"adapted are {', '.join(names)}"
    )


def spec_error(path: str, message: str, hint: str) -> SpecError:
    """A SpecError about one key of the spec."""
    return SpecError(message, problems=[Problem(path, message)], hint=hint)
