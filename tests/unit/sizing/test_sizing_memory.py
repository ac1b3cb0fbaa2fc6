"""The memory estimate against the formula sheet (written out here a second time), published runs, and common sense."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from lora_jobs.sizing import ModelShape, cpu_device, estimate_memory, find_gpu, find_shape
from lora_jobs.units import GIB, MIB

if TYPE_CHECKING:
    from conftest import SpecMaker

    from lora_jobs.sizing import Estimate

A100 = find_gpu("A100-80")


def estimate(make_spec: SpecMaker, changes: dict[str, Any] | None = None, gpu: Any = A100) -> Estimate:
    spec = make_spec(changes)
    return estimate_memory(spec, find_shape(spec.model.name_or_path), gpu)


def instants(found: Estimate) -> dict[str, int]:
    return {instant.name: instant.total for instant in found.instants}


# Llama 3.2 1B, b = 1, s = 1024: h 2048, q 2048, kv 512, i 8192, L 16, H 32, V 128256; r = 16, dropout.
T, H, Q, KV, MID, L, HEADS, V, R = 1024, 2048, 2048, 512, 8192, 16, 32, 128256, 16
P = 1_235_814_400
N = R * L * (2 * (H + Q) + 2 * (H + KV) + 3 * (H + MID))
TENSORS = 2 * 7 * L
FIXED = 2 * P + 4 * N + (8 * N + 512 * TENSORS) + 24 * T
ROPE = 4 * T * 64
FLASH = 4 * Q + 4 * KV + 4 * HEADS


def test_llama_with_checkpointing_is_the_formula_sheet(make_spec: SpecMaker) -> None:
    saved = 2 * H * L * T + ROPE + (4 * H + 4) * T
    recomputed = 33 * H + 3 * Q + 19 * MID + FLASH + 14 * R + 8
    assert instants(estimate(make_spec)) == {
        "model_load": 2 * P,
        "layer_forward": FIXED + ROPE + 2 * N + 2 * H * L * T + (12 * MID + 6 * H) * T,
        "loss_forward": FIXED + saved + 10 * V * T + 2 * H * T + 2 * N,
        "loss_backward": FIXED + saved + 12 * V * T,
        "first_layer_backward": FIXED + ROPE + 2 * N // L + 2 * H * L * T + recomputed * T,
        "last_layer_backward": FIXED + ROPE + 2 * N // L + 2 * H * T + 4 * N * (L - 1) // L + recomputed * T,
        "optimizer_step": 2 * P + 4 * N + (8 * N + 512 * TENSORS) + 4 * N,
        "checkpoint_save": 2 * P + 4 * N + (8 * N + 512 * TENSORS),
    }


def test_llama_without_checkpointing_is_the_formula_sheet(make_spec: SpecMaker) -> None:
    per_layer = 2 * (4 * H + 4) + FLASH + 6 * MID + 3 * (5 * H + Q + MID) + 7 * 2 * R
    first = (4 * H + 4) + 3 * H
    saved = per_layer * L * T + 2 * N + ROPE + (4 * H + 4) * T - first * T
    found = instants(estimate(make_spec, {"training.activation_checkpointing": False}))
    assert found["loss_backward"] == FIXED + saved + 12 * V * T


@pytest.mark.parametrize(("t", "scores_decide"), [(2048, False), (8192, True)])
def test_gemma_2_9b_eager_is_the_formula_sheet(make_spec: SpecMaker, t: int, scores_decide: bool) -> None:
    h, q, i, layers, heads, vocabulary, r = 3584, 4096, 14336, 42, 16, 256_000, 64
    n = 216_072_192
    fixed = 2 * 9_241_705_984 + 4 * n + 8 * n + 512 * 14 * layers + 4 * n + 24 * t
    masks, rope = 2 * 2 * t * t, 4 * t * 256
    saved = 2 * h * layers * t + masks + rope + (4 * h + 4) * t
    eager = 2 * q + 2 * (2 * q) + 8 * heads * t
    mlp = 39 * h + 3 * q + 19 * i + eager + 14 * r + 16
    attention = 4 * h + 4 + 3 * 3 * h + 6 * r + 2 * h + 4 * q + 2 * q + 14 * heads * t
    changes = {
        "model.name_or_path": "google/gemma-2-9b",
        "model.attn_implementation": None,
        "lora.r": 64,
        "data.max_length": t,
        "training.gradient_accumulation_steps": 16,
    }
    found = instants(estimate(make_spec, changes))
    assert found["loss_forward"] == fixed + saved + 12 * vocabulary * t + 2 * h * t + 2 * n
    assert found["loss_backward"] == fixed + saved + 14 * vocabulary * t
    layer = fixed + masks + rope + 2 * n // layers + 2 * h * layers * t
    assert found["first_layer_backward"] == layer + max(mlp, attention) * t
    assert (attention > mlp) is scores_decide


def test_gemma_2_9b_evaluated_at_batch_8_needs_39_gib_of_logits(make_spec: SpecMaker) -> None:
    changes = {
        "model.name_or_path": "google/gemma-2-9b",
        "model.attn_implementation": None,
        "data.max_length": 2048,
        "data.eval": "eval.jsonl",
        "training.eval_steps": 5,
        "training.per_device_eval_batch_size": 8,
    }
    found = estimate(make_spec, changes)
    assert found.binding.name == "evaluation_loss"
    assert found.components["evaluation_logits"] == 10 * 8 * 2048 * 256_000
    assert 39 < found.components["evaluation_logits"] / GIB < 39.1
    fused = estimate(make_spec, changes | {"training.trainer": "trl"})
    assert fused.peak_bytes < found.peak_bytes - 35 * GIB


def test_ligers_loss_builds_the_logits_of_few_rows(make_spec: SpecMaker) -> None:
    changes = {"training.trainer": "transformers", "data.eval": "eval.jsonl", "training.eval_steps": 5}
    stock, liger = (
        {instant.name: instant.parts for instant in estimate(make_spec, changes | more).instants}
        for more in ({}, {"training.use_liger_kernel": True})
    )
    # 128,256 / 2,048 rounded up is 63; 1,024 tokens / 63 is 17, and the next power of two 32 rows of logits.
    assert liger["loss_forward"]["fused_loss"] == 2 * H * T + 2 * 32 * V
    assert liger["loss_backward"]["fused_loss"] == 2 * H * T
    assert stock["loss_backward"]["logits"] == 12 * V * T
    assert liger["evaluation_loss"]["evaluation_fused_loss"] == stock["evaluation_loss"]["evaluation_logits"]


def test_int8_holds_the_inputs_of_every_layer(make_spec: SpecMaker) -> None:
    eight = {"model.quantization.load_in_8bit": True}
    for checkpointing in (True, False):
        found = estimate(make_spec, eight | {"training.activation_checkpointing": checkpointing})
        held = {instant.name: instant.parts.get("inputs_of_int8_layers", 0) for instant in found.instants}
        assert held["last_layer_backward"] == held["loss_backward"] == (2 * 4 * H + 4 * MID + 2 * Q) * L * T
        assert held["optimizer_step"] == 0
    four = estimate(make_spec, {"model.quantization.load_in_4bit": True})
    assert "inputs_of_int8_layers" not in {name for i in four.instants for name, size in i.parts.items() if size}


def test_qlora_weights(make_spec: SpecMaker) -> None:
    changes = {
        "model.quantization.load_in_4bit": True,
        "model.quantization.bnb_4bit_use_double_quant": True,
        "lora.target_modules": ["q_proj", "v_proj"],
    }
    linear = L * (2 * H * Q + 2 * H * KV + 3 * H * MID)
    components = estimate(make_spec, changes).components
    # embedding and norms are cast to fp32 by prepare_model_for_kbit_training
    assert components["base_weights"] == pytest.approx(0.51587 * linear + 4 * (P - linear), abs=7 * L)
    trained = R * L * (2 * H + Q + KV)
    assert components["trainable_weights"] == 4 * trained
    single = estimate(make_spec, changes | {"model.quantization.bnb_4bit_use_double_quant": False})
    assert single.components["base_weights"] == pytest.approx(0.5625 * linear + 4 * (P - linear), abs=7 * L)
    eight = {"model.quantization.load_in_8bit": True, "lora.target_modules": ["q_proj", "v_proj"]}
    rows = L * (2 * Q + 2 * KV + 2 * MID + H - Q + H)
    assert estimate(make_spec, eight).components["base_weights"] == linear + 4 * rows + 4 * (P - linear)


def test_a_quantized_base_is_largest_while_its_embedding_is_cast(make_spec: SpecMaker) -> None:
    """Embedding and norms in fp32, and the embedding's old copy in bf16; DeepSpeed casts them back afterwards."""
    changes = {"model.quantization.load_in_4bit": True, "data.max_length": 256, "training.trainer": "trl"}
    linear = L * (2 * H * Q + 2 * H * KV + 3 * H * MID)
    arriving = pytest.approx(0.5625 * linear + 4 * (P - linear) + 2 * V * H, abs=7 * L)
    for more in ({}, {"deepspeed.zero_stage": 2}):
        found = estimate(make_spec, changes | more)
        assert found.binding.name == "model_load"
        assert found.allocated_peak_bytes == found.untraced_peak_bytes == arriving
        assert found.step_peak_bytes == max(size for name, size in instants(found).items() if name != "model_load")
    single = estimate(make_spec, changes | {"model.dtype": "float32"})
    assert instants(single)["model_load"] == found.allocated_peak_bytes - 2 * V * H


def test_between_steps_there_is_a_second_copy_of_a_trained_tie_only(make_spec: SpecMaker) -> None:
    saved = {"lora.modules_to_save": ["embed_tokens"], "lora.ensure_weight_tying": True}
    for changes, copy in ((saved, 2 * V * H), (saved | {"deepspeed.zero_stage": 2}, 0), ({}, 0)):
        found = estimate(make_spec, changes)
        step, save = (next(i.parts for i in found.instants if i.name == name) for name in HELD)
        gone = ("gradients", "optimizer_temporaries")
        assert save == {name: size for name, size in step.items() if name not in gone} | {"tied_copy": copy}


HELD = ("optimizer_step", "checkpoint_save")


def test_zero_2_over_two_ranks(make_spec: SpecMaker) -> None:
    changes = {"deepspeed.zero_stage": 2, "deepspeed.reduce_bucket_size": 500_000_000, "resources.gpus_per_node": 2}
    found = estimate(make_spec, changes)
    step = next(instant for instant in found.instants if instant.name == "optimizer_step")
    assert {name: size for name, size in step.parts.items() if size} == {
        "base_weights": 2 * P,
        "trainable_weights": 2 * N,
        "optimizer_state": 12 * N // 2,
        "gradients": 2 * N // 2,
        "optimizer_temporaries": 6 * N // 2,
    }
    assert found.components["reduce_buckets"] == 10**9
    assert found.components["nccl_buffers"] == 688 * MIB
    overlapped = estimate(make_spec, changes | {"deepspeed.overlap_comm": True})
    assert overlapped.components["reduce_buckets"] == 2 * 10**9
    assert (
        estimate(make_spec, changes | {"deepspeed.reduce_bucket_size": "auto"}).components["reduce_buckets"]
        == 2 * H * H
    )


def test_a_zero_rank_keeps_the_whole_gradient_of_what_it_has_a_part_of(make_spec: SpecMaker) -> None:
    changes = {"deepspeed.zero_stage": 2, "resources.gpus_per_node": 2}
    tied = {"lora.modules_to_save": ["embed_tokens"], "lora.ensure_weight_tying": True}
    step = next(x for x in estimate(make_spec, changes | tied).instants if x.name == "optimizer_step")
    # The border is in the embedding, so one rank has a part of it and the adapters, the other only a larger part.
    assert step.parts["gradients"] == 2 * (V * H + N)
    first, second = 2 * V * H + 8 * (V * H + N) // 2, 2 * (V * H + N) + 6 * (V * H + N) // 2
    assert step.parts["gradients"] + step.parts["optimizer_temporaries"] == max(first, second)


def test_the_other_parallelisms(make_spec: SpecMaker) -> None:
    two = {"resources.gpus_per_node": 2}
    plain = estimate(make_spec, two)
    assert plain.components["ddp_buckets"] == 4 * N
    by_stage = [estimate(make_spec, two | {"deepspeed.zero_stage": stage}) for stage in (0, 1, 2, 3)]
    optimizer = [found.components["optimizer_state"] for found in by_stage]
    assert optimizer == [12 * N, 6 * N, 6 * N, 6 * N]
    assert by_stage[3].components["base_weights"] == P
    offloaded = estimate(make_spec, two | {"deepspeed.zero_stage": 2, "deepspeed.offload_optimizer": True})
    assert "optimizer_state" not in offloaded.components
    assert offloaded.peak_bytes < by_stage[2].peak_bytes


def test_components_add_up_to_the_peak(make_spec: SpecMaker) -> None:
    for changes in ({}, {"resources.gpus_per_node": 4}, {"model.quantization.load_in_8bit": True}):
        found = estimate(make_spec, changes)
        assert sum(found.components.values()) == found.peak_bytes
        assert found.allocated_peak_bytes == max(instants(found).values())
        assert found.components["cuda_context"] == 501 * MIB
        assert found.components["allocator_margin"] == round(found.allocated_peak_bytes * 0.05)


def test_processes_of_a_node_share_a_cpus_memory(make_spec: SpecMaker) -> None:
    host = cpu_device(64 * GIB)
    single = {"model.dtype": "float32", "training.bf16": False, "model.attn_implementation": "sdpa"}
    one = estimate(make_spec, single | {"resources.gpus_per_node": 1}, host)
    assert one.components["base_weights"] == 4 * P
    assert not {"cuda_context", "nccl_buffers", "cublas_workspaces"} & set(one.components)
    three = estimate(make_spec, single | {"resources.gpus_per_node": 3}, host)
    assert three.allocated_peak_bytes == one.allocated_peak_bytes + three.components["ddp_buckets"]
    assert three.components["other_processes_of_the_node"] * 3 == three.peak_bytes * 2
    assert three.host_memory_bytes == three.peak_bytes


def test_disk_and_host(make_spec: SpecMaker) -> None:
    plain = estimate(make_spec)
    assert plain.checkpoint_bytes == 4 * N + 8 * N + 512 * TENSORS + 134 * V + MIB
    zero = estimate(make_spec, {"deepspeed.zero_stage": 2, "resources.gpus_per_node": 2})
    assert zero.checkpoint_bytes == 2 * N + 2 * N + 12 * N + 134 * V + 2 * MIB
    assert plain.host_memory_bytes == 3 * GIB + 2 * P
    assert zero.host_memory_bytes == 2 * (3 * GIB + 2 * P)


# More of this never needs less memory.
MORE: dict[str, list[Any]] = {
    "training.per_device_train_batch_size": [1, 2, 3, 4, 8],
    "data.max_length": [128, 129, 512, 2048, 8192],
    "lora.r": [1, 8, 64, 256],
    "training.gradient_accumulation_steps": [1, 2, 64],
    "lora.modules_to_save": [[], ["embed_tokens"], ["embed_tokens", "lm_head"]],
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"training.trainer": "trl"},
    {"training.activation_checkpointing": False},
    {"model.attn_implementation": "eager", "model.name_or_path": "google/gemma-2-2b"},
    {"model.attn_implementation": "sdpa", "model.name_or_path": "google/gemma-3-1b-it"},
    {"model.quantization.load_in_4bit": True},
    {"deepspeed.zero_stage": 2, "resources.gpus_per_node": 2},
    {"deepspeed.zero_stage": 3, "resources.nodes": 2},
]


@pytest.mark.parametrize("key", MORE)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_more_never_needs_less(make_spec: SpecMaker, key: str, setting: dict[str, Any]) -> None:
    peaks = [estimate(make_spec, setting | {key: value}).peak_bytes for value in MORE[key]]
    assert peaks == sorted(peaks)
    if key != "training.gradient_accumulation_steps":
        assert peaks[0] < peaks[-1]


# PEFT's method comparison: Llama 3.2 3B on an L40S, b = 4, padded sdpa, no autocast, no checkpointing, a plain loop.
# The longest batch is "about 692" tokens; published is max_memory_reserved: allocated and some unused blocks.
PEFT_RESERVED = [
    (32, ["q_proj", "v_proj"], 22_292_725_760),
    (64, ["q_proj", "v_proj"], 22_552_772_608),
    (10, ["gate_proj", "up_proj", "down_proj"], 24_698_159_104),
]


@pytest.mark.parametrize(("r", "targets", "reserved"), PEFT_RESERVED)
def test_published_by_peft(make_spec: SpecMaker, r: int, targets: list[str], reserved: int) -> None:
    changes = {
        "model.name_or_path": "meta-llama/Llama-3.2-3B",
        "model.attn_implementation": "sdpa",
        "lora.r": r,
        "lora.lora_dropout": 0.0,
        "lora.target_modules": targets,
        "data.max_length": 692,
        "training.per_device_train_batch_size": 4,
        "training.bf16": False,
        "training.activation_checkpointing": False,
    }
    found = estimate(make_spec, changes, find_gpu("L40S"))
    assert found.allocated_peak_bytes < reserved < 1.10 * found.allocated_peak_bytes
    outside = found.components["cuda_context"] + found.components["cublas_workspaces"]
    assert found.peak_bytes - outside == pytest.approx(reserved, rel=0.05)


# Qwen's own table for Qwen-7B on an A100-80GB: LoRA r = 64, flash attention 2, checkpointing, b = 1; GB in use.
@pytest.mark.parametrize(
    ("length", "gigabytes"), [(256, 20.1), (512, 20.4), (1024, 21.5), (2048, 23.8), (4096, 29.7), (8192, 36.6)]
)
def test_published_by_qwen(make_spec: SpecMaker, length: int, gigabytes: float) -> None:
    # Qwen-7B has its own code; its sizes are those of a qwen2 with as many key-value heads as heads.
    shape = ModelShape("qwen-7b", "qwen2", 151936, 4096, 11008, 32, 32, 32, 128, False, 8192, source="its config.json")
    spec = make_spec(
        {"lora.r": 64, "lora.lora_dropout": 0.05, "data.max_length": length, "training.gradient_accumulation_steps": 8}
    )
    assert estimate_memory(spec, shape, A100).peak_bytes == pytest.approx(gigabytes * 1e9, rel=0.05)
