"""How long a job trains: FLOPs per token over what a GPU really sustains, or the speed that earlier runs had.

FLOPs of one token (a multiplication and an addition are two): the forward pass takes 2 for each weight of a linear
layer and 2 s q for each layer's causal attention (s tokens in the row, q the size of the queries). The backward pass
takes the same again for the gradient of the input; the gradient of the weights only where they are trained, which
LoRA leaves to the adapters. Activation checkpointing runs the forward pass of the layers once more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from lora_jobs.sizing.memory import estimate_memory
from lora_jobs.sizing.modules import list_modules
from lora_jobs.sizing.parameters import count_by_part, count_parameters, trainable_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_jobs.sizing.gpus import Gpu
    from lora_jobs.sizing.models import ModelShape
    from lora_jobs.spec.job import JobSpec

TERA = 10**12

SATURATION_TOKENS = 200
"""Tokens of a micro-batch at which half of the utilisation is reached. Fitted to the table named below."""

QUANTIZED_SPEED = 0.75
"""A 4- or 8-bit base is unpacked at each use. Source: the same table, Q-LoRA beside LoRA: 0.74 to 0.91."""

NODE_SPEED = {False: 0.95, True: 0.90}
"""Speed of a GPU among several of one node, and over several nodes, beside one alone. Assumption."""

CPU_FLOPS_PER_CORE = 10 * 10**9
"""What one core sustains of torch's fp32 matrix products. Assumption; only for trials without a GPU."""

START_SECONDS = 60
LOADING_BYTES_PER_SECOND = 10**9
"""Imports and rendezvous, and reading the base model from a parallel file system. Assumption."""

SAVING_BYTES_PER_SECOND = 3 * 10**8
"""Writing, syncing and hashing a checkpoint. Assumption."""

CHARACTERS_PER_TOKEN = 3.5
"""English text and markup with vocabularies of 32,000 to 256,000. Assumption."""

TEMPLATE_TOKENS = 12
"""Turn and end tokens of a chat template. Assumption."""


class Speed(Struct, frozen=True):
    """A GPU type: dense peaks in TFLOP/s by precision, and the part of them that a LoRA step sustains."""

    half: float
    single: float
    utilisation: float
    source: str


_DATASHEET = "peaks: NVIDIA's datasheet, dense; utilisation assumed"
_PUBLISHED = "peaks: NVIDIA's datasheet, dense; utilisation: Qwen-7B's table of LoRA speeds on one A100 (its README)"

# fmt: off
SPEEDS: dict[str, Speed] = {
    # half (bf16 or fp16 with fp32 accumulation), fp32 without tensor cores, utilisation at long micro-batches
    "2080Ti": Speed(53.8, 13.4, 0.35, _DATASHEET),
    "T4": Speed(65.0, 8.1, 0.25, _DATASHEET),
    "V100-16": Speed(125.0, 15.7, 0.35, _DATASHEET),
    "V100-32": Speed(125.0, 15.7, 0.35, _DATASHEET),
    "A4000": Speed(76.7, 19.2, 0.40, _DATASHEET),
    "RTX3090": Speed(71.0, 35.6, 0.50, _DATASHEET),
    "RTX4090": Speed(165.2, 82.6, 0.50, _DATASHEET),
    "RTX5090": Speed(209.5, 104.8, 0.50, _DATASHEET),
    "A10": Speed(125.0, 31.2, 0.35, _DATASHEET),
    "L4": Speed(121.0, 30.3, 0.30, _DATASHEET),
    "A6000": Speed(154.8, 38.7, 0.40, _DATASHEET),
    "A40": Speed(149.7, 37.4, 0.40, _DATASHEET),
    "L40S": Speed(362.0, 91.6, 0.30, _DATASHEET),
    "A100-40": Speed(312.0, 19.5, 0.50, _PUBLISHED),
    "A100-64": Speed(312.0, 19.5, 0.50, _PUBLISHED),
    "A100-80": Speed(312.0, 19.5, 0.50, _PUBLISHED),
    "H100-80": Speed(989.0, 66.9, 0.35, _DATASHEET),
    "H200": Speed(989.0, 66.9, 0.35, _DATASHEET),
}
# fmt: on


class Rows(Struct, frozen=True):
    """Rows of a data file that are used, as tokens each; how many more are too long, how many of all were counted."""

    lengths: tuple[int, ...]
    too_long: int = 0
    counted: int = 0

    @property
    def basis(self) -> Literal["counted", "partly counted", "guessed"]:
        """Whether the tokenizer counted every row's tokens."""
        if self.counted == 0:
            return "guessed"
        return "counted" if self.counted == len(self.lengths) + self.too_long else "partly counted"

    def mean(self) -> float:
        return sum(self.lengths) / len(self.lengths)

    def longest_of(self, count: int) -> float:
        """Expected longest of `count` rows drawn by chance: what a micro-batch is padded to."""
        total = len(self.lengths)
        ordered = sorted(self.lengths)
        return sum(
            length * (((rank + 1) / total) ** count - (rank / total) ** count) for rank, length in enumerate(ordered)
        )


class Work(Struct, frozen=True):
    """What there is to do: optimizer steps, tokens that are text, and tokens that are computed (padding included)."""

    steps: int
    sequences: int
    row_tokens: float
    computed_tokens: float
    evaluation_tokens: float

    @property
    def text_tokens(self) -> float:
        """Tokens that the run's own tokens/s counts: without padding."""
        return self.sequences * self.row_tokens


class Duration(Struct, frozen=True):
    """Expected seconds of a whole run, by what they are for, and where the speed comes from."""

    components: dict[str, float]
    tokens_per_second: float
    basis: str
    measured: bool
    steps: int

    @property
    def seconds(self) -> float:
        return sum(self.components.values())


def count_row_tokens(characters: int) -> int:
    """Tokens of a row with that much text; the tokenizer itself would need the training libraries."""
    return max(1, round(characters / CHARACTERS_PER_TOKEN) + TEMPLATE_TOKENS)


def keep_rows(tokens: Sequence[int], max_length: int, *, counted: int = 0) -> Rows | None:
    """The rows that training would use: longer ones than max_length are left out. None where none is left.

    `counted`: so many of them are known by the tokenizer, the others are guessed.
    """
    lengths = tuple(count for count in tokens if count <= max_length)
    return Rows(lengths, len(tokens) - len(lengths), counted) if lengths else None


def count_work(spec: JobSpec, rows: Rows | None, evaluation: Rows | None) -> Work | None:
    """The work of a run; None where it depends on data that is not here. Without data, rows are max_length long."""
    training, world = spec.training, spec.resources.world_size
    per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * world
    if spec.data.packing:
        packed = None if rows is None else max(1, round(sum(rows.lengths) / spec.data.max_length))
        rows_here, row, computed = packed, float(spec.data.max_length), float(spec.data.max_length)
    elif rows is None:
        rows_here, row, computed = None, float(spec.data.max_length), float(spec.data.max_length)
    else:
        batch = training.per_device_train_batch_size
        rows_here, row, computed = len(rows.lengths), rows.mean(), rows.longest_of(batch)
    multiple = spec.data.pad_to_multiple_of or 1
    computed = -(-computed // multiple) * multiple if multiple > 1 else computed
    if training.max_steps is not None:
        steps = training.max_steps
    elif rows_here is not None and training.num_train_epochs is not None:
        steps = -(-int(rows_here * training.num_train_epochs) // per_step)
    else:
        return None
    return Work(steps, steps * per_step, row, steps * per_step * computed, _count_evaluation(spec, evaluation, steps))


def _count_evaluation(spec: JobSpec, evaluation: Rows | None, steps: int) -> float:
    """Tokens of all evaluations: every eval_steps, and before and after training."""
    if spec.data.eval is None or evaluation is None:
        return 0.0
    times = 2 + (steps // spec.training.eval_steps if spec.training.eval_steps else 0)
    return times * len(evaluation.lengths) * evaluation.longest_of(spec.training.per_device_eval_batch_size)


def forward_flops(spec: JobSpec, shape: ModelShape, row_tokens: float) -> float:
    """FLOPs of one token's forward pass: every linear weight of the text model, the adapters, the attention."""
    text = [module for module in list_modules(shape) if module.kind == "linear" and "vision" not in module.name]
    linear = sum(module.weights for module in text)
    adapters = count_by_part(shape, spec.lora)["lora"]
    return 2.0 * (linear + adapters) + _attention_flops(shape, row_tokens)


def _attention_flops(shape: ModelShape, row_tokens: float) -> float:
    """Scores and values of one token, over the half of the row before it or the window."""
    window = min(row_tokens, shape.sliding_window or row_tokens)
    full = shape.num_hidden_layers - shape.sliding_layers
    return 2.0 * shape.query_size * (full * row_tokens + shape.sliding_layers * window)


def step_flops(spec: JobSpec, shape: ModelShape, row_tokens: float) -> float:
    """FLOPs of one token in a training step: forward, recomputed forward, and both parts of the backward pass."""
    forward = forward_flops(spec, shape, row_tokens)
    attention = _attention_flops(shape, row_tokens)
    trained = sum(tensor.elements for tensor in trainable_tensors(shape, spec.lora) if tensor.module.kind == "linear")
    again = forward if spec.training.activation_checkpointing else 0.0
    return forward + again + (forward + attention) + 2.0 * trained


def sustained_flops(spec: JobSpec, gpu: Gpu, tokens: float) -> tuple[float, str] | None:
    """FLOP/s of one GPU on micro-batches of so many tokens, and what that stands on; None for an unknown GPU."""
    if gpu.is_cpu:
        flops = CPU_FLOPS_PER_CORE * spec.resources.cpus_per_task
        return flops, f"no GPU: {CPU_FLOPS_PER_CORE / 10**9:.0f} GFLOP/s a core assumed"
    speed = SPEEDS.get(gpu.name)
    if speed is None:
        return None
    half = spec.training.bf16 or spec.training.fp16 or spec.model.dtype != "float32"
    peak = speed.half if half else speed.half / 2 if spec.training.tf32 and gpu.has_bf16 else speed.single
    used = speed.utilisation * tokens / (tokens + SATURATION_TOKENS)
    used *= QUANTIZED_SPEED if spec.model.quantization is not None else 1.0
    return peak * TERA * used, f"{used:.0%} of {gpu.name}'s {peak:g} TFLOP/s"


def estimate_duration(
    spec: JobSpec, shape: ModelShape, gpu: Gpu, work: Work, *, measured: float | None = None, runs: str = ""
) -> Duration | None:
    """Expected duration of the run on its GPUs; `measured` is tokens/s of one GPU in earlier runs, named by `runs`.

    None where the GPU is not in the table and nothing was measured.
    """
    world, several = spec.resources.world_size, spec.resources.world_size > 1
    row = work.computed_tokens / max(work.sequences, 1)
    batch = row * spec.training.per_device_train_batch_size
    scale = world * (NODE_SPEED[spec.resources.nodes > 1] if several else 1.0)
    flops = step_flops(spec, shape, row)
    if measured is not None:
        training = work.text_tokens / (measured * scale)
        per_second = measured * scale * work.computed_tokens / max(work.text_tokens, 1) * flops
        basis = f"measured: {measured:,.0f} tokens/s a GPU in {runs}"
    elif (sustained := sustained_flops(spec, gpu, batch)) is not None:
        per_second, basis = sustained[0] * scale, sustained[1]
        training = work.computed_tokens * flops / per_second
    else:
        return None
    estimate = estimate_memory(spec, shape, gpu)
    width = 2 if spec.model.dtype != "float32" else 4
    saves = work.steps // spec.training.save_steps + 1
    components = {
        "start": START_SECONDS + count_parameters(shape) * width / LOADING_BYTES_PER_SECOND,
        "training": training,
        "evaluation": work.evaluation_tokens * forward_flops(spec, shape, row) / per_second,
        "saving": saves * estimate.checkpoint_bytes / SAVING_BYTES_PER_SECOND,
    }
    return Duration(components, work.text_tokens / max(training, 1e-9), basis, measured is not None, work.steps)
