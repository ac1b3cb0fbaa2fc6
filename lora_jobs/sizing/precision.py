"""Bytes per number, by what it is for: what autocast, DeepSpeed, PEFT and bitsandbytes make of the spec."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from lora_jobs.spec.job import JobSpec

HALF, SINGLE = 2, 4


class Precision(Struct, frozen=True):
    """Bytes per element, by what is stored."""

    base: int
    """Weights of the base model that are not quantized."""
    adapter: int
    """LoRA weights, their gradients, and each of their two Adam moments."""
    saved: int
    """The same for trained copies of whole modules (modules_to_save)."""
    residual: int
    """The stream between layers, which is what activation checkpointing keeps."""
    output: int
    """What linear layers give: the MLP's intermediate values."""
    attention: int
    """Queries, keys, values."""
    lora_input: int
    """What an adapter keeps of its input for its own gradient."""
    shares_input: bool
    """Adapters on one input keep one copy (no cast, no dropout in between)."""
    casts_adapters: bool
    """Autocast keeps a half-precision copy of the fp32 adapters."""
    adapter_backward: int
    """Bytes per element of an adapted layer's input, live when its gradient is computed; without dropout."""
    adapter_backward_dropout: int
    """The same with dropout."""
    has_master: bool
    """DeepSpeed keeps a fp32 copy of what it trains."""

    @property
    def casts_queries(self) -> bool:
        """Attention gets copies of queries, keys and values, which autocast makes from fp32 ones."""
        return self.attention != self.output

    @property
    def casts_base(self) -> bool:
        """Autocast makes a half copy of a fp32 base weight at each use, and keeps it for the backward pass."""
        return self.base == SINGLE and self.attention == HALF


def choose_precision(spec: JobSpec) -> Precision:
    """The precision that training really runs in. Sources: PEFT's autocast_adapter_dtype (fp32 adapters),
    DeepSpeed's engine (casts every parameter), prepare_model_for_kbit_training (fp32 for what is not quantized),
    TRL's SFTTrainer (bf16 adapters on a quantized base).
    """
    autocast = spec.deepspeed is not None and spec.deepspeed.torch_autocast
    mixed = spec.training.bf16 or spec.training.fp16 or autocast
    deepspeed = spec.deepspeed is not None
    if deepspeed and mixed and not autocast:
        return _deepspeed_half()
    quantized = spec.model.quantization is not None
    base = SINGLE if quantized or spec.model.dtype == "float32" else HALF
    keeps_dtype = not spec.lora.autocast_adapter_dtype or (
        spec.deepspeed is not None and spec.deepspeed.zero_stage == 3
    )
    half_adapters = (quantized and spec.training.trainer == "trl" and not spec.training.fp16) or (
        base == HALF and keeps_dtype
    )
    adapter = HALF if half_adapters else SINGLE
    output = HALF if base == HALF or (mixed and not quantized) else SINGLE
    lora_input = HALF if mixed or adapter == HALF else SINGLE
    plain = output == lora_input == adapter
    backward, backward_dropout = _adapter_backward(mixed=mixed, output=output, adapter=adapter)
    return Precision(
        base=base,
        adapter=adapter,
        # Beside fp32 adapters ZeRO's one flat tensor of all that is trained is fp32, and so are its parts.
        saved=HALF if half_adapters else SINGLE if deepspeed else base,
        residual=base,
        output=output,
        attention=HALF if mixed or base == HALF else SINGLE,
        lora_input=lora_input,
        shares_input=plain,
        casts_adapters=mixed and adapter == SINGLE,
        adapter_backward=backward,
        adapter_backward_dropout=backward_dropout,
        has_master=deepspeed,
    )


def _deepspeed_half() -> Precision:
    """DeepSpeed with bf16 or fp16: everything is half, nothing is cast, a fp32 master copy is sharded."""
    return Precision(
        base=HALF,
        adapter=HALF,
        saved=HALF,
        residual=HALF,
        output=HALF,
        attention=HALF,
        lora_input=HALF,
        shares_input=True,
        casts_adapters=False,
        adapter_backward=2 * HALF,
        adapter_backward_dropout=3 * HALF,
        has_master=True,
    )


def _adapter_backward(*, mixed: bool, output: int, adapter: int) -> tuple[int, int]:
    """Bytes per input element in an adapted layer's backward: the base's gradient, the adapter's, their casts.

    Autocast over fp32 adapters: 2 base + 2 adapter + 4 cast, and with dropout one fp32 gradient more, less the freed
    half one: 10 (traced). Without casts: one gradient each, and one for dropout.
    """
    if mixed and adapter == SINGLE:
        return 8, 10
    if adapter == output:
        return 2 * output, 3 * output
    return output + adapter + HALF, output + 2 * adapter + HALF
