"""What a job's settings would do that its user may not expect: what is refused, and what is only said."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_jobs.sizing.activations import training_batch
from lora_jobs.sizing.margins import required_bytes
from lora_jobs.sizing.modules import HEAD, find_token_embedding, vision_modules
from lora_jobs.sizing.parameters import (
    count_by_part,
    count_parameters,
    count_trainable,
    list_adapted_names,
    saved_modules,
)
from lora_jobs.sizing.targets import find_dead_alternatives, linear_names
from lora_jobs.units import format_count, format_gib, parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_jobs.sizing.gpus import Gpu
    from lora_jobs.sizing.memory import Estimate
    from lora_jobs.sizing.models import ModelShape
    from lora_jobs.spec.job import JobSpec

USUAL_SHARE = 0.02
"""Trainable parameters of the base: LoRA is usually below this; above it, what makes them up is said."""


def list_warnings(spec: JobSpec, shape: ModelShape, gpu: Gpu, estimate: Estimate) -> Iterator[str]:
    """What the user should know although nothing is refused."""
    length = training_batch(spec).sequence
    if shape.vision is not None:
        yield from _vision_warnings(spec, shape)
    if spec.training.fp16 and shape.model_type in ("gemma2", "gemma3_text"):
        yield f"fp16 with {shape.name}: its activations overflow float16; use training.bf16 with model.dtype: bfloat16"
    if (spec.training.bf16 or spec.model.dtype == "bfloat16") and not gpu.has_bf16:
        yield f"{gpu.name} has no bfloat16 (capability 8.0 and up has): use training.fp16 and model.dtype: float16"
    if length > shape.max_position_embeddings:
        yield f"data.max_length {length} is beyond the {shape.max_position_embeddings} positions of {shape.name}"
    yield from _target_warnings(spec, shape)
    yield from _trainable_warnings(spec, shape)
    yield from _evaluation_warnings(spec, gpu, estimate)
    if gpu.is_cpu:
        yield "no GPU: the estimate is compared with the host's memory, and is less sure there"
    elif "assumed" in gpu.source:
        yield f"nobody measured the CUDA context of {gpu.name}: {format_gib(gpu.context_bytes)} is assumed"
    host_limit = _host_limit(spec)
    if host_limit is not None and estimate.host_memory_bytes > host_limit:
        yield (
            f"loading needs about {format_gib(estimate.host_memory_bytes)} of host memory per node, "
            f"resources.mem asks for {format_gib(host_limit)}"
        )


def describe_trainable(spec: JobSpec, shape: ModelShape) -> str:
    """What the trainable parameters are: adapters of r, and copies of whole modules."""
    counts = count_by_part(shape, spec.lora)
    parts = [f"{format_count(counts['lora'])} adapters of r {spec.lora.r}"]
    saved: dict[str, int] = {}
    for module in saved_modules(shape, spec.lora):
        saved[module.leaf] = saved.get(module.leaf, 0) + module.parameters
    parts += [f"{format_count(elements)} copy of {name}" for name, elements in saved.items()]
    return ", ".join([*parts, f"{format_count(counts['bias'])} biases"] if counts["bias"] else parts)


def _target_warnings(spec: JobSpec, shape: ModelShape) -> Iterator[str]:
    """PEFT says nothing of what a regular expression misses, as long as some of it matches."""
    if dead := find_dead_alternatives(shape, spec.lora.target_modules):
        yield (
            f"lora.target_modules: the alternative{'s' if len(dead) > 1 else ''} {' and '.join(map(repr, dead))} "
            f"{'match' if len(dead) > 1 else 'matches'} no layer of {shape.name}, so less is trained than is written; "
            f"its layers are {', '.join(linear_names(shape))}"
        )


def _trainable_warnings(spec: JobSpec, shape: ModelShape) -> Iterator[str]:
    share = count_trainable(shape, spec.lora) / count_parameters(shape)
    if share > USUAL_SHARE:
        yield (
            f"{share:.1%} of the base is trained, where LoRA usually trains less than {USUAL_SHARE:.0%}: "
            f"{describe_trainable(spec, shape)}"
        )
    if _splits_tied(spec, shape):
        yield "embed_tokens and lm_head are tied; saving them breaks the tie: set lora.ensure_weight_tying"
    if adapted := _find_adapted_tie(spec, shape):
        yield (
            f"an adapter on {' and '.join(adapted)} trains, but cannot be merged: embed_tokens and lm_head of "
            f"{shape.name} are one tensor, which merging changes for both (`export` refuses it); leave "
            f"{'it' if len(adapted) == 1 else 'them'} out of target_modules, or train the tensor whole: "
            "lora.modules_to_save: [embed_tokens] with lora.ensure_weight_tying"
        )


def _evaluation_warnings(spec: JobSpec, gpu: Gpu, estimate: Estimate) -> Iterator[str]:
    """A job that trains and dies in its evaluation."""
    kinds: dict[bool, int] = {False: 0, True: 0}
    for instant in estimate.instants:
        is_evaluation = instant.name.startswith("evaluation")
        kinds[is_evaluation] = max(kinds[is_evaluation], instant.total)
    training, evaluation = (required_bytes(spec, gpu, kinds[kind]) for kind in (False, True))
    if training <= gpu.usable_bytes < evaluation:
        yield (
            f"training fits ({format_gib(training)}) and the evaluation does not ({format_gib(evaluation)}): "
            f"training.per_device_eval_batch_size is {spec.training.per_device_eval_batch_size}"
        )


def _vision_warnings(spec: JobSpec, shape: ModelShape) -> Iterator[str]:
    """A multimodal checkpoint is loaded whole for text, and its vision tower has layers named q_proj too."""
    vision = sum(module.parameters for module in vision_modules(shape))
    text = count_parameters(shape) - vision
    yield (
        f"{shape.name} is multimodal: counted and loaded are its text model ({format_count(text)} parameters) and its "
        f"vision tower with projector ({format_count(vision)}, frozen and idle on text)"
    )
    adapted = list_adapted_names(shape, spec.lora) & {module.name for module in vision_modules(shape)}
    if adapted:
        yield (
            f"target_modules also puts adapters on {len(adapted)} layers of the vision tower, which text never trains "
            "(and several GPUs without DeepSpeed then fail on unused parameters): use a regular expression with "
            "language_model, such as '.*language_model.*(q|k|v|o|gate|up|down)_proj'"
        )


def _splits_tied(spec: JobSpec, shape: ModelShape) -> bool:
    named = {"embed_tokens", "lm_head"} & set(spec.lora.modules_to_save)
    return bool(named) and shape.tie_word_embeddings and not spec.lora.ensure_weight_tying


def _find_adapted_tie(spec: JobSpec, shape: ModelShape) -> list[str]:
    """Which of a tied embedding and output layer carry an adapter; none where modules_to_save parts the two.

    PEFT merges each adapter into the one tensor, so that both change, with ensure_weight_tying twice.
    """
    pair = {find_token_embedding(shape).name, HEAD}
    if not shape.tie_word_embeddings or pair & {module.name for module in saved_modules(shape, spec.lora)}:
        return []
    return sorted(name.rsplit(".", 1)[-1] for name in list_adapted_names(shape, spec.lora) & pair)


def _host_limit(spec: JobSpec) -> int | None:
    return None if spec.resources.mem is None else parse_size(spec.resources.mem)
