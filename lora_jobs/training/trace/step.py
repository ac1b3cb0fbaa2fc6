"""One training step and one evaluation of the real code on fake CUDA tensors, and the peaks of its stretches."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import convert_outputs_to_fp32
from msgspec import Struct
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Trainer
from trl import SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from lora_jobs.sizing.activations import Batch, evaluation_batch, training_batch
from lora_jobs.training.trace.allocator import Books
from lora_jobs.training.trace.build import build_model, find_layers
from lora_jobs.training.trace.components import count_gradients, count_held
from lora_jobs.training.trace.kernels import declare_rows
from lora_jobs.training.trace.quantize import QUANTILES, count_elements, list_state, temporary_bytes

if TYPE_CHECKING:
    from lora_jobs.spec import JobSpec

FUSED_OUTPUTS = ("log_probs", "entropy", "is_top1")
"""What SFTTrainer asks its fused head for. Source: trl/trainer/sft_trainer.py, 1.16.0."""


class StepTrace(Struct, frozen=True):
    """Peak allocated bytes of each stretch (loss_forward, loss_backward, layer_backward_<n>, optimizer_step,
    evaluation; `static` is what is there before the step), the parameters of the model, and the bytes of what stays.
    """

    peaks: dict[str, int]
    parameters: dict[str, int]
    components: dict[str, int]


def trace_step(spec: JobSpec, config: Any) -> StepTrace:
    """One step of a job whose model has this config."""
    books = Books(temporary_bytes() if spec.model.quantization is not None else {})
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"), books:
        model = build_model(spec, config)
        if spec.training.trainer == "trl":
            add_fused_lm_head(model.get_base_model(), outputs=FUSED_OUTPUTS)
        gc.collect()
        books.keep_only([*model.parameters(), *model.buffers(), *list_state(model)])
        parameters = count_parameters(model)
        books.peaks.clear()
        books.enter("weights")
        optimizer = None if spec.deepspeed is not None else prepare_optimizer(spec, model)
        if spec.deepspeed is not None:
            _drop_gradients(model)
        components = count_held(model, optimizer)
        books.enter("static")
        forward = wrap_forward(spec, model)
        layers = find_layers(model, config)
        _mark_layers(books, layers)
        model.train()
        _train(spec, books, forward)
        if optimizer is not None:
            components["gradients"] = count_gradients(model)
            books.enter("optimizer_step")
            take_step(spec, model, optimizer)
            optimizer.zero_grad()
        if spec.data.eval is not None:  # before step 1 and after the last, whatever training.eval_steps says
            _evaluate(spec, books, forward, model)
        books.enter("end")
    return StepTrace(books.peaks, parameters, components)


def count_parameters(model: Any) -> dict[str, int]:
    """Parameters of the base model and what is trained."""
    counts = {"base": 0, "trainable": 0, "trainable_bytes": 0}
    for name, parameter in model.named_parameters():
        elements = count_elements(parameter)
        if parameter.requires_grad:
            counts["trainable"] += elements
            counts["trainable_bytes"] += elements * parameter.element_size()
        if not any(mark in name for mark in _ADDED):
            counts["base"] += elements
    return counts


_ADDED = (".lora_", ".modules_to_save.", ".trainable_tokens_")
"""What PEFT puts into the names of the parameters that it adds."""


def _trained(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def prepare_optimizer(spec: JobSpec, model: Any) -> Any:
    """AdamW with its moments there, as from the second step on; with accumulation also the gradients."""
    if not spec.training.optim.startswith("adamw_torch"):
        return _prepare_bitsandbytes(spec, model)
    fused = spec.training.optim == "adamw_torch_fused"
    optimizer = torch.optim.AdamW(
        _trained(model), lr=1e-4, fused=True if fused else None, foreach=None if fused else True
    )
    for parameter in _trained(model):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    if spec.training.gradient_accumulation_steps == 1:
        optimizer.zero_grad()
    return optimizer


def _prepare_bitsandbytes(spec: JobSpec, model: Any) -> Any:
    """bitsandbytes' AdamW: its own state tensors; a step runs in their place. Paged tensors are the driver's."""
    from bitsandbytes.optim import AdamW

    bits = 8 if spec.training.optim.endswith("8bit") else 32
    optimizer = AdamW(_trained(model), optim_bits=bits, is_paged=spec.training.optim.startswith("paged"))
    device = torch.empty(0)

    def get_state_buffer(parameter: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        paged = optimizer.is_paged and parameter.numel() >= PAGED_ELEMENTS
        return torch.zeros_like(parameter, dtype=dtype, device="meta" if paged else device.device)

    optimizer.get_state_buffer = get_state_buffer
    optimizer.name2qmap = {name: torch.zeros(QUANTILES) for name in ("dynamic", "udynamic")}
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, number, place)
    if spec.training.gradient_accumulation_steps > 1:
        for parameter in _trained(model):
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step = lambda: None
    return optimizer


PAGED_ELEMENTS = 100_000
"""Smaller tensors' states are not paged. Source: Optimizer8bit.get_state_buffer, bitsandbytes 0.50.2."""


def _drop_gradients(model: Any) -> None:
    """DeepSpeed takes every gradient away as soon as it is there: what it keeps of them is counted apart."""

    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None

    for parameter in _trained(model):
        parameter.register_post_accumulate_grad_hook(drop)


def wrap_forward(spec: JobSpec, model: Any) -> Any:
    """accelerate's mixed precision: autocast around forward, and outputs in fp32. Source: Accelerator.prepare_model."""
    mixed = spec.training.bf16 or spec.training.fp16
    if spec.deepspeed is not None and spec.deepspeed.torch_autocast:
        model.forward = torch.autocast("cuda", dtype=torch.bfloat16)(model.forward)
        return model
    if not mixed or spec.deepspeed is not None:
        return model
    autocast = torch.autocast("cuda", dtype=torch.bfloat16 if spec.training.bf16 else torch.float16)
    model.forward = convert_outputs_to_fp32(autocast(model.forward))
    return model


def _mark_layers(books: Books, layers: list[Any]) -> None:
    """Begin a stretch where the last layer's output is there, and where each layer's output has its gradient."""

    def mark(index: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if books.stretch == "forward" and hidden.requires_grad:
                hidden.register_hook(lambda _: books.enter(f"layer_backward_{index}"))
            if index == len(layers) - 1 and books.stretch in ("forward", "evaluation_layer"):
                books.enter({"forward": "loss_forward", "evaluation_layer": "evaluation_loss"}[books.stretch])

        return hook

    for index, layer in enumerate(layers):
        layer.register_forward_hook(mark(index))


def make_inputs(batch: Batch, *, packed: bool = False) -> dict[str, Any]:
    """A batch as the collator gives it: token ids, labels, attention mask, or positions where rows are packed."""
    shape = (batch.rows, batch.sequence)
    last = "position_ids" if packed else "attention_mask"
    return {name: torch.zeros(shape, dtype=torch.int64) for name in ("input_ids", "labels", last)}


def compute_loss(spec: JobSpec, model: Any, inputs: dict[str, Any]) -> Any:
    """The trainer's own compute_loss, on as much of a trainer as it looks at."""
    trainer = SimpleNamespace(
        model=model,
        args=SimpleNamespace(loss_type="nll", average_tokens_across_devices=False, past_index=-1, n_gpu=1),
        accelerator=SimpleNamespace(
            parallelism_config=None, num_processes=1, gather_for_metrics=lambda _: np.float64(1)
        ),
        compute_loss_func=None,
        label_smoother=None,
        aux_loss_enabled=False,
        model_accepts_loss_kwargs=True,
        _metrics={"train": _Lists(), "eval": _Lists()},
        _total_train_tokens=0,
        _tp_size=1,
        get_tp_size=lambda: 1,
    )
    items = torch.ones((), dtype=torch.int64) if model.training else None
    trainer_class = SFTTrainer if spec.training.trainer == "trl" else Trainer
    return trainer_class.compute_loss(trainer, model, inputs, num_items_in_batch=items)


def is_padded(spec: JobSpec, batch: Batch) -> bool:
    """Whether a batch has padding: rows of unlike length, or a multiple asked for."""
    return batch.rows > 1 or spec.data.pad_to_multiple_of is not None


class _Lists(dict[str, list[Any]]):
    def __missing__(self, key: str) -> list[Any]:
        return self.setdefault(key, [])


def _train(spec: JobSpec, books: Books, forward: Any) -> None:
    declare_rows(padded=is_padded(spec, training_batch(spec)), packed=spec.data.packing)
    inputs = make_inputs(training_batch(spec), packed=spec.data.packing)
    books.enter("forward")
    loss = compute_loss(spec, forward, inputs)
    books.enter("loss_backward")
    loss.backward()


def take_step(spec: JobSpec, model: Any, optimizer: torch.optim.Optimizer) -> None:
    if spec.training.max_grad_norm:
        torch.nn.utils.clip_grad_norm_(_trained(model), spec.training.max_grad_norm)
    optimizer.step()


def _evaluate(spec: JobSpec, books: Books, forward: Any, model: Any) -> None:
    model.eval()
    gc.collect()
    books.enter("evaluation_inputs")  # no part of the optimizer's step
    declare_rows(padded=is_padded(spec, evaluation_batch(spec)), packed=spec.data.packing)
    inputs = make_inputs(evaluation_batch(spec), packed=spec.data.packing)
    books.enter("evaluation_layer")
    with torch.no_grad():
        compute_loss(spec, forward, inputs)
