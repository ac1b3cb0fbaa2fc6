"""From traces of a few layers to the whole model: every instant's peak is linear in the number of layers of a kind."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_jobs.errors import SpecError
from lora_jobs.runs import write_atomic
from lora_jobs.sizing import find_gpu, find_shape
from lora_jobs.sizing.instants import list_instants
from lora_jobs.training.trace.build import layer_kinds, load_config, with_layers
from lora_jobs.training.trace.shim import find_cache
from lora_jobs.training.trace.step import trace_step

if TYPE_CHECKING:
    from lora_jobs.spec import JobSpec

LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate")


@dataclass(frozen=True, slots=True)
class Trace:
    """Peak allocated bytes of each instant, by the closed form's names, and how they were come by."""

    instants: dict[str, int]
    layers_traced: tuple[int, ...]
    versions: dict[str, str]

    @property
    def peak_bytes(self) -> int:
        """Of training and, where the job evaluates, of evaluation."""
        return max(self.instants.values())


def trace_job(spec: JobSpec, *, cached: bool = True) -> Trace:
    """The trace of a job on one GPU; an earlier one with the same spec, model and versions is read back."""
    config = load_config(spec.model.name_or_path)
    versions = {name: version(name) for name in LIBRARIES}
    path = find_cache() / "traces" / f"{_cache_key(spec, config, versions)}.json"
    if cached and path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        return Trace(stored["instants"], tuple(stored["layers_traced"]), stored["versions"])
    kinds = layer_kinds(config)
    layouts = [kinds] if _names_layers(spec) else choose_layouts(kinds)
    traced = [_by_instant(trace_step(spec, with_layers(config, layout)), len(layout)) for layout in layouts]
    instants = traced[0] if len(traced) == 1 else extrapolate(kinds, layouts, traced)
    if spec.deepspeed is not None or spec.resources.world_size > 1:
        instants = add_parallel_state(spec, instants)
    trace = Trace(instants, tuple(len(layout) for layout in layouts), versions)
    path.parent.mkdir(exist_ok=True, mode=0o700)
    write_atomic(path, json.dumps(asdict(trace)))
    return trace


PARALLEL_PARTS = {"optimizer_state", "gradients", "new_gradients", "head_gradient", "reduce_buckets"}
"""What DeepSpeed's engine holds on a rank; it needs its GPUs to start, so these are the closed form's."""


def add_parallel_state(spec: JobSpec, instants: dict[str, int]) -> dict[str, int]:
    """A traced rank with what several ranks or DeepSpeed add to it, which is not traced but computed by sizing.

    Errors: SpecError under ZeRO-3, which gathers parameters as it goes, and for a model that sizing does not know.
    """
    if spec.deepspeed is not None and spec.deepspeed.zero_stage == 3:
        raise SpecError("deepspeed.zero_stage: 3 cannot be traced", hint="use check without --exact")
    shape = find_shape(spec.model.name_or_path)
    computed = {instant.name: instant for instant in list_instants(spec, shape, find_gpu("A100-80"))}
    added = {"ddp_buckets"} if spec.deepspeed is None else PARALLEL_PARTS
    total = {}
    for name, traced in instants.items():
        parts = computed["loss_forward" if name == "forward" else name].parts
        total[name] = traced + sum(size for part, size in parts.items() if part in added)
    if spec.deepspeed is not None:
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
    return bool(spec.lora.layers_to_transform) or any(letter.isdigit() for text in expressions for letter in text)


def _cache_key(spec: JobSpec, config: Any, versions: dict[str, str]) -> str:
    values = spec.to_values()
    sections = {name: values[name] for name in ("model", "lora", "training", "deepspeed", "resources")}
    code = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
    batch = [spec.data.max_length, spec.data.pad_to_multiple_of, spec.data.packing]
    text = json.dumps([sections, batch, config.to_dict(), versions, code], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
