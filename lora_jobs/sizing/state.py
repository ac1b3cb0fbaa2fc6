"""What stays on a device for the whole training: base, adapters, optimizer, gradients; per rank, under ZeRO or not."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from lora_jobs.sizing.modules import HEAD, Module, find_token_embedding, list_modules
from lora_jobs.sizing.parameters import TrainableTensor, saved_modules, trainable_tensors
from lora_jobs.sizing.precision import HALF, SINGLE, Precision
from lora_jobs.sizing.shares import Share, list_shares

if TYPE_CHECKING:
    from lora_jobs.sizing.models import ModelShape
    from lora_jobs.spec.job import DeepSpeedSpec, JobSpec, LoraSpec, QuantizationSpec

NF4_BYTES = 0.5625
"""Per parameter: 4 bits, and a fp32 absmax for every 64. Source: bitsandbytes, blocksize 64."""

NF4_DOUBLE_QUANT_BYTES = 0.51587
"""With the absmax quantized again to 8 bits, in blocks of 256. Source: QLoRA, arXiv:2305.14314, section 3."""

ADAM_8BIT_BLOCK = 256
"""Elements that share one fp32 absmax in each of the two 8-bit moments. Source: bitsandbytes, Optimizer2State."""

ADAM_8BIT_SMALLEST = 4096
"""Tensors below this many elements keep fp32 moments. Source: bitsandbytes, min_8bit_size."""

PAGED_ELEMENTS = 100_000
"""Smaller tensors keep their moments on the device. Source: Optimizer8bit.get_state_buffer of bitsandbytes 0.50."""

DOUBLE = 8
"""Bytes of fp64, in which DeepSpeed takes norms. Source: get_norm_dtype in runtime/zero/utils.py, 0.19."""

STEP_TENSOR_BYTES = 512
"""A fused AdamW keeps its step counter on the device: one allocator block per tensor."""

DEEPSPEED_LIVE_PARAMETERS = 1_000_000_000
"""ZeRO-3 lets this many gathered parameters live at once. Source: stage3_max_live_parameters."""


class State(Struct, frozen=True):
    """Bytes on one device, through the whole of training."""

    base: int
    trainable: int
    optimizer: int
    gradients: int
    """As kept between backward and step: every one, under ZeRO this rank's; 0 where they are kept on the host."""
    accumulated: int
    """What is kept while a later micro-batch runs: the gradients where they accumulate, else 0."""
    growing: float
    """Share of a gradient that the backward pass keeps beside `accumulated`: 1 the whole, 1/W of it under ZeRO-2."""
    partition: int = 0
    """ZeRO-2's buffer for this rank's gradients, in full as soon as the first of them is there; 0 without one."""
    reduce_buckets: int = 0
    """ZeRO's communication buffers: they live through the backward pass. Without them (contiguous_gradients off) the
    gradients of other ranks that wait to be sent."""
    ddp_buckets: int = 0
    """DistributedDataParallel's: they stay."""
    step_transient: int = 0
    """What the optimizer step allocates and frees again."""
    gathered: int = 0
    """ZeRO-3: parameters gathered for use."""
    host_optimizer: int = 0
    """The part of the optimizer's state that is on the host instead."""
    head_gradient: int = 0
    """The gradient of a trained output layer; 0 where it is frozen."""
    embedding_gradient: int = 0
    adds_tied_gradients: bool = False
    """Whether the trained embedding and output layer are one tensor."""
    merged_head: int = 0
    """trainable_token_indices on a tied model: the output layer's weight with the trained rows put in, each step."""


def weight_bytes(module: Module, precision: Precision, quantization: QuantizationSpec | None) -> int:
    """Bytes of one module of the base. Embeddings, norms and lm_head are never quantized."""
    if quantization is None or not _is_quantized(module):
        return module.parameters * precision.base
    biases = module.biases * precision.base
    if quantization.load_in_8bit:
        return module.weights + SINGLE * module.fan_out + biases
    width = NF4_DOUBLE_QUANT_BYTES if quantization.bnb_4bit_use_double_quant else NF4_BYTES
    return round(module.weights * width) + biases


def _is_quantized(module: Module) -> bool:
    return module.kind == "linear" and module.name != HEAD


def base_bytes(shape: ModelShape, precision: Precision, quantization: QuantizationSpec | None) -> int:
    """Bytes of the frozen base model, its tied head counted once."""
    return sum(
        weight_bytes(module, precision, quantization)
        for module in list_modules(shape)
        if not (module.name == HEAD and shape.tie_word_embeddings)
    )


def tensor_bytes(tensor: TrainableTensor, precision: Precision) -> int:
    """Bytes of one trained tensor; a gradient has as many."""
    widths = {"saved": precision.saved, "bias": precision.base}
    width = widths.get(tensor.part, precision.adapter)
    return tensor.elements * width


def moment_bytes(tensor: TrainableTensor, precision: Precision, optim: str) -> int:
    """Bytes of Adam's two moments for one tensor: in the tensor's own dtype, fp32 from a fp32 master, or 8 bits."""
    if optim.endswith("_8bit") and tensor.elements >= ADAM_8BIT_SMALLEST:
        return 2 * (tensor.elements + SINGLE * -(-tensor.elements // ADAM_8BIT_BLOCK))
    if precision.has_master or "bit" in optim:
        return 2 * SINGLE * tensor.elements
    return 2 * tensor_bytes(tensor, precision) + (STEP_TENSOR_BYTES if optim == "adamw_torch_fused" else 0)


def paged_bytes(tensor: TrainableTensor, optim: str) -> int:
    """Bytes of one tensor's moments in managed memory; the absmax of 8-bit ones stay on the device."""
    if not optim.startswith("paged_") or tensor.elements < PAGED_ELEMENTS:
        return 0
    return 2 * tensor.elements * (1 if optim.endswith("_8bit") else SINGLE)


class Sizes(Struct, frozen=True):
    """Bytes before anything is sharded."""

    base: int
    copies: int
    gradients: int
    moments: int
    paged: int
    """The part of the moments that a paged optimizer keeps in managed memory, outside torch's allocator."""
    elements: int


@lru_cache(maxsize=64)  # a dozen changes are tried on a job, and few of them change this
def compute_sizes(
    shape: ModelShape, lora: LoraSpec, precision: Precision, quantization: QuantizationSpec | None, optim: str
) -> Sizes:
    """The sizes of one job."""
    # The layers of a model are alike: of hundreds of tensors a dozen differ in what decides their bytes.
    tensors = trainable_tensors(shape, lora)
    counts = Counter((tensor.part, tensor.elements) for tensor in tensors)
    kinds = {(tensor.part, tensor.elements): tensor for tensor in tensors}
    rows = [(counts[kind], tensor) for kind, tensor in kinds.items()]
    return Sizes(
        base=base_bytes(shape, precision, quantization),
        # A trained bias is the base's own; everything else that is trained is new.
        copies=sum(count * tensor_bytes(tensor, precision) for count, tensor in rows if tensor.part != "bias"),
        gradients=sum(count * tensor_bytes(tensor, precision) for count, tensor in rows),
        moments=sum(count * moment_bytes(tensor, precision, optim) for count, tensor in rows),
        paged=sum(count * paged_bytes(tensor, optim) for count, tensor in rows),
        elements=sum(count * tensor.elements for count, tensor in rows),
    )


def compute_state(spec: JobSpec, shape: ModelShape, precision: Precision) -> State:
    """The state of one rank under the job's parallelism."""
    sizes = compute_sizes(shape, spec.lora, precision, spec.model.quantization, spec.training.optim)
    if spec.deepspeed is None:
        state = _plain_state(spec, sizes)
    else:
        state = _zero_state(spec, spec.deepspeed, shape, precision, sizes)
    # The rows are put into a copy of the whole embedding, whose gradient is as large. Source: TrainableTokensLayer.
    tokens = shape.vocab_size * shape.hidden_size * precision.base if spec.lora.trainable_token_indices else 0
    return replace(
        state,
        head_gradient=_saved_bytes(shape, spec.lora, precision, HEAD),
        embedding_gradient=tokens or _saved_bytes(shape, spec.lora, precision, find_token_embedding(shape).name),
        adds_tied_gradients=_saves_tied(shape, spec.lora),
        merged_head=tokens if shape.tie_word_embeddings else 0,
    )


def _plain_state(spec: JobSpec, sizes: Sizes) -> State:
    """No DeepSpeed: one process, or DistributedDataParallel, whose buckets are a second copy of all gradients."""
    accumulates = spec.training.gradient_accumulation_steps > 1
    return State(
        base=sizes.base,
        trainable=sizes.copies,
        optimizer=sizes.moments - sizes.paged,
        host_optimizer=sizes.paged,
        gradients=sizes.gradients,
        accumulated=sizes.gradients if accumulates else 0,
        growing=0 if accumulates else 1,
        ddp_buckets=sizes.gradients if spec.resources.world_size > 1 else 0,
        step_transient=sizes.gradients if spec.training.optim == "adamw_torch" else 0,
    )


def _zero_state(spec: JobSpec, zero: DeepSpeedSpec, shape: ModelShape, precision: Precision, sizes: Sizes) -> State:
    """DeepSpeed over W ranks: stage 1 splits the optimizer, 2 also the gradients, 3 also the parameters.

    Sources: ZeRO, arXiv:1910.02054, section 5; stage_1_and_2.py and stage3.py of DeepSpeed 0.19.
    """
    ranks, stage, width = spec.resources.world_size, zero.zero_stage, precision.adapter
    shards, gradient_shards, parameter_shards = (ranks if stage >= first else 1 for first in (1, 2, 3))
    master = SINGLE * sizes.elements
    optimizer = (master + sizes.moments) // shards
    on_device = 0 if zero.offload_optimizer else 1
    divided = list_shares(shape, spec.lora, ranks) if stage in (1, 2) else (Share(sizes.elements // shards, 0),)
    own = max(share.kept for share in divided) / sizes.elements
    gradients = int(on_device * sizes.gradients * own)
    accumulates = spec.training.gradient_accumulation_steps > 1
    live = min(sizes.base + sizes.copies, DEEPSPEED_LIVE_PARAMETERS * width)
    # The step takes the norm of each gradient in fp64, then flattens them, and makes a fp32 copy of half ones.
    flattened = (sizes.gradients + (master if width == HALF else 0)) // shards
    step = max(
        int(sizes.gradients * share.kept / sizes.elements) + max(flattened, DOUBLE * share.largest) for share in divided
    )
    return State(
        base=sizes.base // parameter_shards,
        trainable=sizes.copies // parameter_shards,
        optimizer=on_device * optimizer,
        host_optimizer=0 if on_device else optimizer + master // shards,
        gradients=gradients,
        accumulated=(gradients if stage >= 2 else on_device * sizes.gradients) if accumulates else 0,
        growing=on_device * (own if stage == 2 else 1 / gradient_shards) if stage >= 2 or not accumulates else 0,
        partition=gradients if stage == 2 and zero.contiguous_gradients else 0,
        reduce_buckets=_bucket_bytes(spec, zero, shape, precision, sizes.gradients - gradients) if stage >= 1 else 0,
        step_transient=on_device * step - gradients,
        gathered=live if parameter_shards > 1 else 0,
    )


def _bucket_bytes(spec: JobSpec, zero: DeepSpeedSpec, shape: ModelShape, precision: Precision, others: int) -> int:
    """The reduce bucket is allocated in full, whatever is trained; twice with overlap_comm. auto is hidden_size^2.

    Under torch_autocast there is one for each dtype that gradients are sent in: half for those of linear layers, else
    the tensor's own. Not contiguous, it is gradients of `others` themselves that wait for a bucket to fill, or to be
    sent.
    """
    elements = shape.hidden_size**2 if zero.reduce_bucket_size == "auto" else zero.reduce_bucket_size
    size = elements * precision.adapter * (2 if zero.overlap_comm else 1)
    if not zero.contiguous_gradients:
        return min(size, others) if zero.zero_stage == 2 else 0
    sent_whole = zero.torch_autocast and precision.adapter == SINGLE and spec.lora.use_dora
    return 2 * size if sent_whole else size


def _saved_bytes(shape: ModelShape, lora: LoraSpec, precision: Precision, name: str) -> int:
    """Bytes of the gradient of a whole trained embedding or head; 0 where it is frozen.

    A head that stays tied gets its gradient in the embedding's one copy.
    """
    saved = {module.name for module in saved_modules(shape, lora)}
    if name not in saved and not _saves_tied(shape, lora):
        return 0
    return shape.vocab_size * shape.hidden_size * precision.saved


def _saves_tied(shape: ModelShape, lora: LoraSpec) -> bool:
    """Whether embedding and output layer are trained as the one tensor that they are."""
    if not (shape.tie_word_embeddings and lora.ensure_weight_tying):
        return False
    return any(module.is_token_embedding for module in saved_modules(shape, lora))
