"""When in a run each peak comes, in words: what a person would see in the log of a job that died there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import asdict

from lora_jobs.sizing.activations import evaluation_batch, training_batch
from lora_jobs.sizing.instants import CHECKPOINT_SAVE, MODEL_LOAD, TIED_COPY
from lora_jobs.sizing.losses import uses_fused_loss
from lora_jobs.sizing.margins import required_bytes
from lora_jobs.units import format_count

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lora_jobs.sizing.activations import Batch
    from lora_jobs.sizing.gpus import Gpu
    from lora_jobs.sizing.instants import Instant
    from lora_jobs.sizing.models import ModelShape
    from lora_jobs.spec.job import JobSpec

_EVALUATION, _OPTIMIZER, _STATE = "evaluation", "optimizer_step", "optimizer_state"


class Moment(Struct, frozen=True):
    """The first time that an instant is reached: what happens, when, and what is allocated then."""

    instant: str
    what: str
    when: str
    step: int
    allocated_bytes: int

    @property
    def words(self) -> str:
        return f"{self.when}: {self.what}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def list_moments(spec: JobSpec, shape: ModelShape, instants: Sequence[Instant]) -> tuple[Moment, ...]:
    """The moments of a run in the order of time.

    The untrained model is evaluated before the first step. Without DeepSpeed the optimizer's state exists from the
    first optimizer step on, so a forward or backward pass that it makes too large dies in step 2.
    """
    return tuple(sorted(_place(spec, shape, instants), key=lambda moment: moment.step))


def find_peak(moments: Sequence[Moment]) -> Moment:
    """The largest moment; of equals the first."""
    return max(moments, key=lambda moment: moment.allocated_bytes)


def find_death(spec: JobSpec, gpu: Gpu, moments: Sequence[Moment]) -> Moment | None:
    """The first moment that does not fit; None where all do."""
    return next((m for m in moments if required_bytes(spec, gpu, m.allocated_bytes) > gpu.usable_bytes), None)


def _place(spec: JobSpec, shape: ModelShape, instants: Sequence[Instant]) -> Iterator[Moment]:
    lazy = spec.deepspeed is None
    for instant in instants:
        name, total, what = instant.name, instant.total, describe_instant(spec, shape, instant)
        later = total - instant.parts.get(_STATE, 0) if lazy else total
        if name == MODEL_LOAD:
            yield Moment(name, what, "before step 1", 0, total)
            yield _set_up(instants, lazy=lazy)
        elif name.startswith(_EVALUATION):
            yield Moment(name, what, "before step 1, in the first evaluation", 0, later)
            if spec.training.eval_steps is not None and later < total:
                step = spec.training.eval_steps
                yield Moment(name, what, f"at step {step}, in the evaluation", step, total)
        elif name == CHECKPOINT_SAVE:
            yield Moment(name, what, f"at step {spec.training.save_steps}", spec.training.save_steps, total)
        elif name == _OPTIMIZER:
            yield Moment(name, what, "at the end of step 1", 1, total)
        else:
            yield Moment(name, what, "at step 1", 1, later)
            if later < total:
                yield Moment(name, what, "at step 2, beside the optimizer's state", 2, total)


def _set_up(instants: Sequence[Instant], *, lazy: bool) -> Moment:
    """What is held between steps, before the first of them: the optimizer's state only under DeepSpeed."""
    held = next(instant.parts for instant in instants if instant.name == CHECKPOINT_SAVE)
    later = (TIED_COPY, _STATE) if lazy else (TIED_COPY,)
    start = sum(size for name, size in held.items() if name not in later)
    what = "adding the adapters" if lazy else "setting up the optimizer"
    return Moment("setup", what, "before step 1", 0, start)


def describe_instant(spec: JobSpec, shape: ModelShape, instant: Instant) -> str:
    """What happens at an instant, with the sizes that make it large."""
    vocabulary = f"{format_count(shape.vocab_size)} tokens of vocabulary"
    loss = "the fused loss" if uses_fused_loss(spec) or spec.training.use_liger_kernel else "the loss"
    train, evaluation = _describe_batch(training_batch(spec)), _describe_batch(evaluation_batch(spec))
    words = {
        "loss_forward": f"{loss} of {train} over {vocabulary}",
        "loss_backward": f"{loss} of {train} over {vocabulary}",
        "head_backward": f"the gradient of the trained output layer, {vocabulary}",
        "first_layer_backward": f"the backward pass of {train}, in the last layer",
        "last_layer_backward": f"the end of the backward pass of {train}",
        "embedding_backward": f"the gradient of the trained embedding, {vocabulary}",
        "optimizer_step": "the optimizer's first step",
        "evaluation_loss": f"the loss of an evaluation batch of {evaluation} over {vocabulary}",
        "evaluation_layer": f"a layer under an evaluation batch of {evaluation}",
        MODEL_LOAD: "loading the model",
        CHECKPOINT_SAVE: "the first checkpoint",
    }
    return words.get(instant.name, instant.words)


def _describe_batch(batch: Batch) -> str:
    return f"{batch.rows} x {format_count(batch.sequence)} tokens"
