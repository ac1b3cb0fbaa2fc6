"""A sweep and the specs that it stands for: every combination of its values."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from lora_jobs.errors import Problem, SpecError
from lora_jobs.spec.display import show_value
from lora_jobs.spec.load import replace_values

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_jobs.spec.job import JobSpec


class Variant(Struct, frozen=True):
    """One combination of a sweep: the values by dotted key, and the spec that has them and sweeps nothing."""

    values: Mapping[str, Any]
    spec: JobSpec


def parse_sweep_option(text: str) -> str:
    """`lora.r=8,16` as the override that sets `sweep.lora.r`. Errors: SpecError when it is not KEY=VALUE,VALUE."""
    key, equals, values = text.partition("=")
    if not equals or not key.strip() or not values.strip():
        message = f"{show_value(text)} is no sweep: wanted section.key=value,value"
        raise SpecError(message, hint="--sweep lora.r=8,16,32")
    listed = values if values.lstrip().startswith("[") else f"[{values}]"
    return f"sweep.{key.strip()}={listed}"


def count_variants(spec: JobSpec) -> int:
    """How many specs the sweep stands for; 1 where it sweeps nothing."""
    return math.prod(len(values) for values in spec.sweep.values())


def expand_sweep(spec: JobSpec) -> tuple[Variant, ...]:
    """Every combination, in the order of the keys, the last key varying fastest; the spec itself without a sweep.

    Errors: SpecError with everything that is wrong, each combination's values named.
    """
    variants: list[Variant] = []
    problems: list[Problem] = []
    for choice in itertools.product(*spec.sweep.values()):
        values = dict(zip(spec.sweep, choice, strict=True))
        try:
            changed = replace_values(spec, {**values, "sweep": {}}) if values else spec
        except SpecError as error:
            found = error.problems or (Problem("", error.message),)
            problems += [Problem(each.path, f"{each.message} ({show_variant(values)})") for each in found]
        else:
            variants.append(Variant(values, changed))
    if problems:
        total = count_variants(spec)
        count = f"{total - len(variants)} of {total} combinations"
        more = [Problem("", f"and {len(problems) - 20} more")] if len(problems) > 20 else []
        raise SpecError(f"{spec.name}: the sweep can't run, {count} are wrong", problems=[*problems[:20], *more])
    return tuple(variants)


def show_variant(values: Mapping[str, Any], *, short: bool = False) -> str:
    """The values in one line: lora.r=8 training.learning_rate=0.0001; `short` leaves the sections out."""
    return " ".join(
        f"{key.rpartition('.')[2] if short else key}={value if isinstance(value, str) else show_value(value)}"
        for key, value in values.items()
    )
