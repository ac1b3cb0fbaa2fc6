"""The instants of a run at which memory can peak, each as named parts; the peak is the largest of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from lora_jobs.sizing.activations import (
    Batch,
    evaluation_batch,
    input_needs_gradient,
    mask_bytes,
    norm_bytes,
    rope_bytes,
    training_batch,
)
from lora_jobs.sizing.layers import LayerCost, layer_costs
from lora_jobs.sizing.losses import LossCost, loss_cost
from lora_jobs.sizing.modules import find_token_embedding, list_modules
from lora_jobs.sizing.precision import HALF, SINGLE, Precision, choose_precision
from lora_jobs.sizing.quantized import attention_output, evaluated_mlp, held_inputs, normed_input
from lora_jobs.sizing.state import State, base_bytes, compute_state

if TYPE_CHECKING:
    from lora_jobs.sizing.gpus import Gpu
    from lora_jobs.sizing.models import ModelShape
    from lora_jobs.spec.job import JobSpec

INPUT_BYTES = 24
"""Per token: input ids, labels and attention mask, 8 bytes each."""

MODEL_LOAD, CHECKPOINT_SAVE, TIED_COPY = "model_load", "checkpoint_save", "tied_copy"

UNTRACED = (MODEL_LOAD, CHECKPOINT_SAVE)
"""The instants that a trace of a step has not."""


class Instant(Struct, frozen=True):
    """One moment of the run: what is allocated then, by name, in bytes."""

    name: str
    words: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class Step(Struct, frozen=True):
    """Everything that the instants are made of."""

    spec: JobSpec
    shape: ModelShape
    gpu: Gpu
    precision: Precision
    state: State
    batch: Batch
    layers: list[LayerCost]
    loss: LossCost

    @property
    def checkpointing(self) -> bool:
        return self.spec.training.activation_checkpointing

    @property
    def adapter_elements(self) -> int:
        """LoRA parameters of all layers."""
        return sum(layer.adapter_elements for layer in self.layers)

    @property
    def layer_input(self) -> int:
        """Bytes of the residual stream between two layers."""
        return self.precision.residual * self.shape.hidden_size * self.batch.tokens

    def kept(self, gradient: int, *, beside: int = 0) -> int:
        """Bytes that the backward pass keeps of a new gradient, beside what earlier micro-batches left, and beside
        those of an earlier gradient.
        """
        if self.state.partition:
            return self.state.partition if gradient and not beside else 0
        return int(gradient * self.state.growing)


def build_step(spec: JobSpec, shape: ModelShape, gpu: Gpu) -> Step:
    """The quantities of one step of this job on this device."""
    precision = choose_precision(spec)
    state = compute_state(spec, shape, precision)
    batch = training_batch(spec)
    loss = loss_cost(
        spec,
        shape,
        precision,
        batch,
        evaluation_batch(spec),
        head_gradient=state.head_gradient or state.merged_head,
        on_cpu=gpu.is_cpu,
    )
    layers = layer_costs(spec, shape, gpu, precision, batch)
    return Step(spec, shape, gpu, precision, state, batch, layers, loss)


def list_instants(spec: JobSpec, shape: ModelShape, gpu: Gpu) -> tuple[Instant, ...]:
    """The instants of the job, in the order of a run: its start, a step, an evaluation, a save."""
    step = build_step(spec, shape, gpu)
    return (
        _model_load(step),
        *_layer_forward(step),
        _loss_forward(step),
        *_loss_backward(step),
        *_layer_backward(step),
        *_embedding_backward(step),
        _optimizer_step(step),
        *_evaluation(step),
        _checkpoint_save(step),
    )


def _model_load(step: Step) -> Instant:
    """The base as it arrives on the device, before adapters and optimizer. A quantized one is loaded there tensor by
    tensor (transformers), then prepare_model_for_kbit_training makes float32 what is not quantized: of the largest,
    the embedding or the output layer, the old copy is still there. DeepSpeed casts it back later.
    """
    quantization, dtype = step.spec.model.quantization, step.spec.model.dtype
    parts = {"base_weights": step.state.base}
    if quantization is not None:
        parts["base_weights"] = base_bytes(step.shape, replace(step.precision, base=SINGLE), quantization)
        parts["embedding_before_cast"] = HALF * find_token_embedding(step.shape).weights if dtype != "float32" else 0
    return Instant(MODEL_LOAD, "while the model is loaded", parts)


def _checkpoint_save(step: Step) -> Instant:
    """What is there between two steps: no gradients, no activations. Trainer, PEFT and DeepSpeed write the live tensors
    by way of the host; of an embedding and an output layer that are trained as one, PEFT makes a second copy on the
    device (save_pretrained), DeepSpeed's are on the host by then.
    """
    tied = step.state.embedding_gradient if step.state.adds_tied_gradients and step.spec.deepspeed is None else 0
    return Instant(CHECKPOINT_SAVE, "while a checkpoint is saved", {**_held(step), TIED_COPY: tied})


def _held(step: Step) -> dict[str, int]:
    """What is there all the time."""
    state = step.state
    return {
        "base_weights": state.base,
        "trainable_weights": state.trainable,
        "optimizer_state": state.optimizer,
        "gathered_parameters": state.gathered,
        "ddp_buckets": state.ddp_buckets,
    }


def _fixed(step: Step) -> dict[str, int]:
    """What is there through forward and backward of a micro-batch."""
    held = held_inputs(step.spec, step.shape, step.precision) * len(step.layers)
    return {
        **_held(step),
        "gradients": step.state.accumulated,
        "inputs": INPUT_BYTES * step.batch.tokens,
        "inputs_of_int8_layers": held * step.batch.tokens,
    }


def _shared(step: Step) -> dict[str, int]:
    """Masks and rotary tables, made once for all layers."""
    return {
        "attention_masks": mask_bytes(step.spec, step.shape, step.gpu, step.precision, step.batch),
        "rotary_embeddings": rope_bytes(step.shape, step.precision, step.batch),
    }


def _adapter_casts(step: Step, elements: int) -> int:
    """Autocast's half copies of fp32 adapters."""
    return HALF * elements if step.precision.casts_adapters else 0


def _weight_casts(step: Step, layers: int) -> int:
    """Autocast's half copies of a fp32 base's weights, saved with the activations; quantized layers make none."""
    if not step.precision.casts_base or step.spec.model.quantization is not None:
        return 0
    modules = list_modules(step.shape)
    one = sum(module.weights for module in modules if module.layer == 0 and module.kind == "linear")
    return HALF * one * layers


def _activations(step: Step) -> dict[str, int]:
    """A: what forward has saved when the loss is reached. With checkpointing one input per layer, else everything."""
    tokens = step.batch.tokens
    if step.checkpointing:
        saved = step.layer_input * len(step.layers)
        return {"checkpoints": saved + _final_norm(step), **_shared(step)}
    saved = sum(layer.saved for layer in step.layers) * tokens
    if not input_needs_gradient(step.spec, step.shape):
        normed = normed_input(step.spec, step.shape, step.precision)
        saved -= (step.layers[0].first_unneeded + normed) * tokens
    saved -= attention_output(step.spec, step.shape, step.precision) * len(step.layers) * tokens
    return {
        "saved_activations": saved + _final_norm(step),
        "adapter_casts": _adapter_casts(step, step.adapter_elements),
        "weight_casts": _weight_casts(step, len(step.layers)),
        "dora": sum(layer.dora for layer in step.layers),
        **_shared(step),
    }


def _final_norm(step: Step) -> int:
    """Bytes that the norm after the last layer keeps."""
    return norm_bytes(step.shape.hidden_size) * step.batch.tokens


def _layer_forward(step: Step) -> list[Instant]:
    """The last layer's forward pass: without checkpointing DoRA rebuilds a weight there beside everything saved; with
    it, what runs through the MLP may be more than the loss takes after it (adapters of high rank, a small vocabulary).
    Eager attention's scores always weigh more in the backward pass.
    """
    last, quantized = step.layers[-1], step.spec.model.quantization is not None
    dora = last.dora_peak
    if step.checkpointing and not (dora or quantized or last.attention_backward or step.state.merged_head):
        layer = {
            "checkpoints": step.layer_input * len(step.layers),
            "adapter_casts": _adapter_casts(step, step.adapter_elements),
            "forward_layer": last.mlp_forward * step.batch.tokens,
            **_shared(step),
        }
    elif dora and not step.checkpointing:
        layer = _activations(step)
        layer["saved_activations"] += dora.saved - last.saved * step.batch.tokens - _final_norm(step)
        layer |= {"dora": layer["dora"] + dora.kept - last.dora, "dora_rebuilt_weight": dora.rebuilt}
    else:
        return []
    return [Instant("layer_forward", "in the forward pass of the last layer", {**_fixed(step), **layer})]


def _merged_head(step: Step) -> dict[str, int]:
    """The tied output layer with its trained rows put in, and its input, kept for those rows' gradient."""
    if not step.state.merged_head:
        return {}
    return {
        "merged_head": step.state.merged_head,
        "head_input": step.precision.output * step.shape.hidden_size * step.batch.tokens,
    }


def _loss_forward(step: Step) -> Instant:
    casts = _adapter_casts(step, step.adapter_elements)
    hidden = step.precision.residual * step.shape.hidden_size * step.batch.tokens
    parts = {
        **_fixed(step),
        **_activations(step),
        "adapter_casts": casts,
        "hidden_states": hidden,
        step.loss.name: step.loss.forward,
        **_merged_head(step),
    }
    return Instant("loss_forward", "while the loss is computed", parts)


def _loss_backward(step: Step) -> list[Instant]:
    common = {
        **_fixed(step),
        **_activations(step),
        **_merged_head(step),
        "reduce_buckets": step.state.reduce_buckets,
    }
    parts = {**common, step.loss.name: step.loss.backward}
    instants = [Instant("loss_backward", "while the loss is differentiated", parts)]
    if step.state.head_gradient or step.state.merged_head:
        parts = {**common, step.loss.name: step.loss.head_backward}
        instants.append(Instant("head_backward", "while the output layer's gradient is computed", parts))
    return instants


def _layer_backward(step: Step) -> list[Instant]:
    """The first and the last backward of a layer: all inputs still saved, or all gradients there."""
    tokens, count = step.batch.tokens, len(step.layers)
    common = {
        **_fixed(step),
        "reduce_buckets": step.state.reduce_buckets,
        "head_gradient": step.kept(step.state.head_gradient),
    }
    last, first = step.layers[-1], step.layers[0]
    adapters = step.precision.adapter * step.adapter_elements
    late = {"new_gradients": step.kept(adapters * (count - 1) // count, beside=step.state.head_gradient)}
    if step.checkpointing:
        begin = {**_recomputed(step, last), "checkpoints": step.layer_input * count}
        end = {**_recomputed(step, first), "checkpoints": step.layer_input, **late}
    else:
        begin = {**_activations(step), "layer_backward": (_live(last) - last.saved) * tokens}
        end = {**_shared(step), "layer_backward": _live(first) * tokens, **late}
    return [
        Instant("first_layer_backward", "in the backward pass of the last layer", {**common, **begin}),
        Instant("last_layer_backward", "at the end of the backward pass", {**common, **end}),
    ]


def _live(layer: LayerCost) -> int:
    """Bytes per token at the worst moment of one layer's backward: in its MLP, or in eager attention's scores."""
    return max(layer.saved + layer.mlp_backward, layer.attention_backward)


def _recomputed(step: Step, layer: LayerCost) -> dict[str, int]:
    parts = {
        **_shared(step),
        "recomputed_layer": _live(layer) * step.batch.tokens,
        "adapter_casts": _adapter_casts(step, layer.adapter_elements),
        "weight_casts": _weight_casts(step, 1),
        "dora": layer.dora,
    }
    dora = layer.dora_peak
    # Beside the gradient of what the layer gives, fp32 and cast; twice, unless a norm is the layer's last. Traced.
    copies = 2 if step.shape.traits.norms_per_layer == 2 else 1
    gradient = copies * (SINGLE + step.precision.residual) * step.layer_input // step.precision.residual
    if dora and dora.total + gradient > parts["recomputed_layer"] + parts["dora"]:
        rebuilding = {"recomputed_layer": dora.saved + gradient, "dora": dora.kept, "dora_rebuilt_weight": dora.rebuilt}
        parts |= rebuilding
    return parts


def _embedding_backward(step: Step) -> list[Instant]:
    """A trained embedding gets a dense gradient at the very end, beside every other one; where the output layer is the
    same tensor, theirs are added up in a third.
    """
    if not step.state.embedding_gradient:
        return []
    others = step.precision.adapter * step.adapter_elements + step.state.head_gradient
    parts = {
        **_fixed(step),
        "new_gradients": step.kept(others),
        "embedding_gradient": step.state.embedding_gradient * (2 if step.state.adds_tied_gradients else 1),
        "reduce_buckets": step.state.reduce_buckets,
        "hidden_states": step.layer_input,
    }
    return [Instant("embedding_backward", "while the embedding's gradient is computed", parts)]


def _optimizer_step(step: Step) -> Instant:
    parts = {**_held(step), "gradients": step.state.gradients, "optimizer_temporaries": step.state.step_transient}
    return Instant("optimizer_step", "in the optimizer's step", parts)


def _evaluation(step: Step) -> list[Instant]:
    """Evaluation keeps no activations, but has a batch size and a loss of its own."""
    if step.spec.data.eval is None:
        return []
    batch = evaluation_batch(step.spec)
    shape, precision = step.shape, step.precision
    shared = {
        **_held(step),
        "inputs": INPUT_BYTES * batch.tokens,
        "adapter_casts": _adapter_casts(step, step.adapter_elements),
    }
    tables = {
        "attention_masks": mask_bytes(step.spec, shape, step.gpu, precision, batch),
        "rotary_embeddings": rope_bytes(shape, precision, batch),
    }
    hidden = precision.residual * shape.hidden_size * batch.tokens
    merged = {"merged_head": step.state.merged_head}
    loss = {**shared, **merged, "hidden_states": hidden, f"evaluation_{step.loss.name}": step.loss.evaluation}
    layer = {**shared, **tables, "evaluation_layer": _evaluated_layer(step, batch)}
    return [
        Instant("evaluation_loss", "while an evaluation's loss is computed", loss),
        Instant("evaluation_layer", "in a layer of an evaluation", layer),
    ]


def _evaluated_layer(step: Step, batch: Batch) -> int:
    """One layer without gradients: the stream (four copies and one in fp32), and either the MLP's four intermediate
    values (an adapter on a fused gate_up_proj: three of twice the size), beside the scores that eager attention
    returns, or those scores while they are made. Traced.
    """
    shape, precision = step.shape, step.precision
    costs = layer_costs(step.spec, shape, step.gpu, precision, batch)
    if step.spec.model.quantization is None:
        stream = (4 * precision.residual + SINGLE) * shape.hidden_size
        mlp = (6 if costs[-1].fused_gate else 4) * precision.output * shape.intermediate_size
    else:
        stream = 4 * precision.residual * shape.hidden_size
        mlp = evaluated_mlp(step.spec, shape, precision)
    scores = 0
    if any(layer.attention_backward for layer in costs):
        mlp += precision.attention * shape.num_attention_heads * batch.sequence
        scores = (2 * precision.attention + SINGLE) * shape.num_attention_heads * batch.sequence
        scores += 4 * precision.attention * shape.query_size
    return (stream + max(mlp, scores)) * batch.tokens
