"""The answer of `check`: does the job fit the device, what is its memory for, and what would make it fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_jobs.errors import Problem, SpecError
from lora_jobs.sizing.activations import training_batch
from lora_jobs.sizing.gpus import GPUS, Gpu
from lora_jobs.sizing.memory import Estimate, estimate_memory
from lora_jobs.sizing.models import find_shape
from lora_jobs.sizing.modules import vision_modules
from lora_jobs.sizing.parameters import count_parameters, count_trainable, trainable_tensors
from lora_jobs.sizing.refusals import find_unworkable
from lora_jobs.sizing.suggestions import Suggestion, suggest_changes
from lora_jobs.units import format_count, format_gib, parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lora_jobs.sizing.models import ModelShape
    from lora_jobs.spec.job import JobSpec


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a job fits, and everything that says why."""

    gpu: Gpu
    world_size: int
    parameters_base: int
    parameters_trainable: int
    estimate: Estimate
    suggestions: tuple[Suggestion, ...]
    warnings: tuple[str, ...]
    problems: tuple[Problem, ...] = ()
    smallest_gpu: str | None = None
    """Where it does not fit: the smallest GPU of the table that would do; None where none does."""

    @property
    def fits(self) -> bool:
        return self.estimate.peak_bytes <= self.gpu.usable_bytes

    def to_json(self) -> dict[str, Any]:
        """The document of `check --json`; keys are stable."""
        estimate = self.estimate
        return {
            "fits": self.fits,
            "world_size": self.world_size,
            "gpu": {
                "name": self.gpu.name,
                "memory_bytes": self.gpu.memory_bytes,
                "usable_bytes": self.gpu.usable_bytes,
            },
            "parameters": {"base": self.parameters_base, "trainable": self.parameters_trainable},
            "estimate": {
                "peak_bytes": estimate.peak_bytes,
                "allocated_peak_bytes": estimate.allocated_peak_bytes,
                "components": dict(estimate.components),
                "binding_instant": estimate.binding_instant,
                "instants": {instant.name: instant.total for instant in estimate.instants},
            },
            "host_memory_bytes": estimate.host_memory_bytes,
            "checkpoint_bytes": estimate.checkpoint_bytes,
            "problems": [problem.to_json() for problem in self.problems],
            "warnings": list(self.warnings),
            "suggestions": [suggestion.to_json() for suggestion in self.suggestions],
            "smallest_gpu": self.smallest_gpu,
        }


def size_job(spec: JobSpec, gpu: Gpu, *, warnings: Sequence[str] = ()) -> Verdict:
    """Size the job for one device type. SpecError for an unknown model, targets that match nothing, or settings
    that the libraries refuse; whether it fits is in the verdict, not an error.
    """
    shape = find_shape(spec.model.name_or_path)
    _refuse_unworkable(spec, shape, gpu)
    estimate = estimate_memory(spec, shape, gpu)
    fits = estimate.peak_bytes <= gpu.usable_bytes
    return Verdict(
        gpu=gpu,
        world_size=spec.resources.world_size,
        parameters_base=count_parameters(shape),
        parameters_trainable=count_trainable(shape, spec.lora),
        estimate=estimate,
        suggestions=() if fits else suggest_changes(spec, gpu, estimate),
        warnings=(*warnings, *_warnings(spec, shape, gpu, estimate)),
        smallest_gpu=None if fits else _find_smallest_gpu(spec, shape),
    )


def _find_smallest_gpu(spec: JobSpec, shape: ModelShape) -> str | None:
    for gpu in sorted(GPUS, key=lambda gpu: gpu.usable_bytes):
        if gpu.has_bf16 and estimate_memory(spec, shape, gpu).peak_bytes <= gpu.usable_bytes:
            return gpu.name
    return None


def _refuse_unworkable(spec: JobSpec, shape: ModelShape, gpu: Gpu) -> None:
    """What would fail on the node, hours later: SpecError with all of it."""
    if problems := find_unworkable(spec, shape, gpu):
        raise SpecError("; ".join(problem.message for problem in problems), problems=problems)


def _warnings(spec: JobSpec, shape: ModelShape, gpu: Gpu, estimate: Estimate) -> Iterator[str]:
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
    if _splits_tied(spec, shape):
        yield (
            f"{shape.name} ties embed_tokens and lm_head; modules_to_save makes two independent copies of them and "
            "breaks the tie: lora.ensure_weight_tying keeps one"
        )
    if spec.lora.use_dora:
        yield "DoRA keeps more activations than LoRA: they are not in this estimate"
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


def _vision_warnings(spec: JobSpec, shape: ModelShape) -> Iterator[str]:
    """A multimodal checkpoint is loaded whole for text, and its vision tower has layers named q_proj too."""
    vision = sum(module.parameters for module in vision_modules(shape))
    text = count_parameters(shape) - vision
    yield (
        f"{shape.name} is multimodal: counted and loaded are its text model ({format_count(text)} parameters) and its "
        f"vision tower with projector ({format_count(vision)}, frozen and idle on text)"
    )
    tower = {module.name for module in vision_modules(shape)}
    adapted = {tensor.module.name for tensor in trainable_tensors(shape, spec.lora)} & tower
    if adapted:
        yield (
            f"target_modules also puts adapters on {len(adapted)} layers of the vision tower, which text never trains "
            "(and several GPUs without DeepSpeed then fail on unused parameters): use a regular expression with "
            "language_model, such as '.*language_model.*(q|k|v|o|gate|up|down)_proj'"
        )


def _splits_tied(spec: JobSpec, shape: ModelShape) -> bool:
    named = {"embed_tokens", "lm_head"} & set(spec.lora.modules_to_save)
    return bool(named) and shape.tie_word_embeddings and not spec.lora.ensure_weight_tying


def _host_limit(spec: JobSpec) -> int | None:
    return None if spec.resources.mem is None else parse_size(spec.resources.mem)
