"""The closed form beside runs that others published: changes of memory, as the closed form counts allocated bytes and
they report what the allocator reserved, or what the driver showed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_jobs.sizing import ModelShape, find_gpu, find_shape
from lora_jobs.sizing.instants import list_instants

if TYPE_CHECKING:
    from lora_jobs.spec import JobSpec

PEFT_SOURCE = "PEFT, method_comparison/MetaMathQA: Llama 3.2 3B in bf16 on an L40S, batch 4, peak reserved bytes"
PEFT_RESERVED = {
    "r 32 on q, v": (22_292_725_760, {"lora__r": 32, "lora__target_modules": ["q_proj", "v_proj"]}),
    "r 64 on q, v": (22_552_772_608, {"lora__r": 64, "lora__target_modules": ["q_proj", "v_proj"]}),
    "r 10 on gate, up, down": (
        24_698_159_104,
        {"lora__r": 10, "lora__target_modules": ["gate_proj", "up_proj", "down_proj"]},
    ),
}
PEFT_TOKENS = 692
"""Of the longest batch: read off the stock loss, which is the peak of the first of the runs."""

QWEN_SOURCE = (
    "Qwen-7B's README: LoRA on one A100-80, batch 1, flash attention, checkpointing, from 1,024 to 8,192 tokens"
)
QWEN_BYTES = {1024: 21.5e9, 8192: 36.6e9}
QWEN = ModelShape("qwen-7b", "llama", 151936, 4096, 11008, 32, 32, 32, 128, False, 8192, source=QWEN_SOURCE)


def compare_published(build_spec: Any) -> dict[str, Any]:
    """Published and predicted changes; `error_percent` is of the published total for PEFT, of the slope for Qwen."""
    return {**_compare_peft(build_spec), **_compare_qwen(build_spec)}


def _peak(spec: JobSpec, shape: ModelShape) -> int:
    return max(instant.total for instant in list_instants(spec, shape, find_gpu("A100-80")))


def _compare_peft(build_spec: Any) -> dict[str, Any]:
    shape, predicted = find_shape("llama-3.2-3b"), {}
    for name, (_, changes) in PEFT_RESERVED.items():
        spec = build_spec(
            "llama-3.2-3b",
            model__attn_implementation="sdpa",
            lora__lora_dropout=0.0,
            data__max_length=PEFT_TOKENS,
            training__trainer="transformers",
            training__per_device_train_batch_size=4,
            training__bf16=False,
            training__activation_checkpointing=False,
            training__optim="adamw_torch",
            **changes,
        )
        predicted[name] = _peak(spec, shape)
    first = next(iter(PEFT_RESERVED))
    rows = {}
    for name, (reserved, _) in PEFT_RESERVED.items():
        if name == first:
            continue
        change, seen = predicted[name] - predicted[first], reserved - PEFT_RESERVED[first][0]
        rows[f"PEFT: from {first} to {name}"] = {
            "published_bytes": seen,
            "predicted_bytes": change,
            "error_percent": round(100 * (change - seen) / reserved, 3),
            "source": PEFT_SOURCE,
        }
    return rows


def _compare_qwen(build_spec: Any) -> dict[str, Any]:
    peaks = {}
    for tokens in QWEN_BYTES:
        spec = build_spec(
            "llama-3.2-1b",  # the settings only; the shape is QWEN
            model__attn_implementation="flash_attention_2",
            lora__r=64,
            data__max_length=tokens,
            training__trainer="transformers",
        )
        peaks[tokens] = _peak(spec, QWEN)
    short, long = QWEN_BYTES
    seen = (QWEN_BYTES[long] - QWEN_BYTES[short]) / (long - short)
    slope = (peaks[long] - peaks[short]) / (long - short)
    return {
        "Qwen-7B: bytes per token": {
            "published_bytes": round(seen),
            "predicted_bytes": round(slope),
            "error_percent": round(100 * (slope / seen - 1), 3),
            "source": QWEN_SOURCE,
        }
    }
