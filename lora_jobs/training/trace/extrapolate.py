"""From traces of a few layers to the whole model: every instant's peak is linear in the number of layers of a kind."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import asdict, replace

from lora_jobs.errors import SpecError
from lora_jobs.sizing import find_gpu, find_shape
from lora_jobs.sizing.instants import list_instants
from lora_jobs.sizing.models import UnknownModelError
from lora_jobs.training.trace.build import layer_kinds, load_config, with_layers
from lora_jobs.training.trace.cache import find_versions, load_trace, store_trace, trace_key
from lora_jobs.training.trace.step import trace_step

if TYPE_CHECKING:
    from lora_jobs.spec import JobSpec


class Trace(Struct, frozen=True):
    """Peak allocated bytes of each instant, by the closed form's names, and how they were come by."""

    instants: dict[str, int]
    layers_traced: tuple[int, ...]
    versions: dict[str, str]
    parameters: dict[str, int]
    """Of the base model and trained ones, and the bytes of the trained."""
    components: dict[str, int]
    """Bytes of what stays through a step, by the closed form's names; under DeepSpeed of the weights only."""

    @property
    def peak_bytes(self) -> int:
        """Of training and, where the job evaluates, of evaluation."""
        return max(self.instants.values())


def trace_job(spec: JobSpec, *, cached: bool = True) -> Trace:
    """The trace of a job on one GPU; an earlier one with the same spec, model, code and versions is read back."""
    trace = _trace_rank(spec, cached=cached)
    if spec.deepspeed is not None:
        return replace(trace, instants=add_deepspeed_state(spec, trace.instants))
    if spec.resources.world_size > 1:  # DistributedDataParallel's buckets: a second copy of all gradients
        buckets = trace.parameters["trainable_bytes"]
        return replace(trace, instants={name: peak + buckets for name, peak in trace.instants.items()})
    return trace


def _trace_rank(spec: JobSpec, *, cached: bool) -> Trace:
    """The libraries' code alone, without what the engine of several ranks adds; only this is stored."""
    config = load_config(spec.model.name_or_path)
    versions = find_versions()
    key = trace_key(spec, config.to_dict(), versions)
    stored = load_trace(key) if cached else None
    if stored is not None:
        return Trace(**{**stored, "layers_traced": tuple(stored["layers_traced"])})
    kinds = layer_kinds(config)
    layouts = [kinds] if _names_layers(spec) else choose_layouts(kinds)
    steps = [trace_step(spec, with_layers(config, layout)) for layout in layouts]
    peaks = [_by_instant(step.peaks, len(layout)) for step, layout in zip(steps, layouts, strict=True)]
    parameters = extrapolate(kinds, layouts, [step.parameters for step in steps])
    traced = tuple(len(layout) for layout in layouts)
    components = extrapolate(kinds, layouts, [step.components for step in steps])
    trace = Trace(extrapolate(kinds, layouts, peaks), traced, versions, parameters, components)
    store_trace(key, asdict(trace))
    return trace


PARALLEL_PARTS = {"optimizer_state", "gradients", "new_gradients", "head_gradient", "reduce_buckets"}
"""What DeepSpeed's engine holds on a rank; it needs its GPUs to start, so these are the closed form's."""


def add_deepspeed_state(spec: JobSpec, instants: dict[str, int]) -> dict[str, int]:
    """A traced rank with what DeepSpeed adds to it, which is not traced but computed by sizing.

    Errors: SpecError under ZeRO-3, which gathers parameters as it goes, and for a model that sizing does not know.
    """
    if spec.deepspeed is not None and spec.deepspeed.zero_stage == 3:
        raise SpecError("deepspeed.zero_stage: 3 cannot be traced", hint="use check without --exact")
    try:
        shape = find_shape(spec.model.name_or_path)
    except UnknownModelError as error:
        message = "deepspeed: its state is computed, not traced, and only for the model families of `lora-jobs models`"
        raise SpecError(message, hint="trace the job without the deepspeed section: ZeRO takes less") from error
    computed = {instant.name: instant for instant in list_instants(spec, shape, find_gpu("A100-80"))}
    total = {}
    for name, traced in instants.items():
        parts = computed["loss_forward" if name == "forward" else name].parts
        total[name] = traced + sum(size for part, size in parts.items() if part in PARALLEL_PARTS)
    total["optimizer_step"] = computed["optimizer_step"].total
    return total


def choose_layouts(kinds: list[str]) -> list[list[str]]:
    """A base with the model's first and last layer and one of every kind; then, kind by kind, one layer more."""
    ends = (kinds[0], kinds[-1])
    base = [kinds[0], *dict.fromkeys(kind for kind in kinds if kind not in ends), kinds[-1]]
    if len(kinds) <= len(base):
        return [kinds]
    return [base, *([base[0], kind, *base[1:]] for kind in dict.fromkeys(kinds))]


def extrapolate(kinds: list[str], layouts: list[list[str]], traced: list[dict[str, int]]) -> dict[str, int]:
    """Each instant of the whole model: the base's, and for every layer beyond it what one more of its kind added."""
    if len(layouts) == 1:
        return traced[0]
    base, whole = Counter(layouts[0]), Counter(kinds)
    peaks = dict(traced[0])
    for kind, more in zip(dict.fromkeys(kinds), traced[1:], strict=True):
        for name in peaks:
            peaks[name] += (whole[kind] - base[kind]) * (more[name] - traced[0][name])
    return peaks


def _by_instant(peaks: dict[str, int], layers: int) -> dict[str, int]:
    """Stretches by the closed form's names; a layer's backward pass peaks in the last layer or in the first."""
    names = {
        "forward": "forward",
        "loss_forward": "loss_forward",
        "loss_backward": "loss_backward",
        f"layer_backward_{layers - 1}": "first_layer_backward",
        "layer_backward_0": "last_layer_backward",
        "optimizer_step": "optimizer_step",
        "evaluation_layer": "evaluation_layer",
        "evaluation_loss": "evaluation_loss",
    }
    return {name: peaks[stretch] for stretch, name in names.items() if stretch in peaks}


def _names_layers(spec: JobSpec) -> bool:
    """Whether the adapters may differ between layers of one kind: numbered layers, or a number in an expression."""
    expressions = [names for names in (spec.lora.targets, spec.lora.exclude_modules) if isinstance(names, str)]
    patterns = [*spec.lora.rank_pattern, *spec.lora.alpha_pattern, *expressions]
    return bool(spec.lora.layers_to_transform) or any(letter.isdigit() for text in patterns for letter in text)
