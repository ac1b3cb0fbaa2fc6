"""Precisions, quantized bases, ZeRO stages, kinds of adapters: each trains for real, and says what its adapter is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from tiny_runs import read_logs

from lora_jobs.runs import load_attempts, load_metrics

if TYPE_CHECKING:
    from collections.abc import Callable

    from tiny_runs import RankServer

    from lora_jobs.runs import Run

pytestmark = pytest.mark.train

BF16: dict[str, Any] = {"model": {"dtype": "bfloat16"}, "training": {"bf16": True}}
NF4: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}
FP4: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}


def quantized(quantization: dict[str, Any], **training: Any) -> dict[str, Any]:
    return {"model": {"dtype": "bfloat16", "quantization": quantization}, "training": {"bf16": True, **training}}


def sharded(sections: dict[str, Any], **zero: Any) -> dict[str, Any]:
    """Two processes under ZeRO."""
    return {**sections, "deepspeed": zero, "resources": {"gpus_per_node": 2}}


def read_dtypes(run: Run) -> set[str]:
    """The dtypes in the adapter's file, by safetensors' names."""
    with (run.adapter / "adapter_model.safetensors").open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return {tensor["dtype"] for name, tensor in header.items() if name != "__metadata__"}


CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "bf16": (BF16, {"F32"}),
    "bf16, recomputed activations": ({**BF16, "training": {"bf16": True, "activation_checkpointing": True}}, {"F32"}),
    "NF4, nested": (quantized(NF4), {"BF16"}),
    "FP4, stock loss": (quantized(FP4, trainer="transformers"), {"F32"}),
    "int8, stock loss": (quantized({"load_in_8bit": True}, trainer="transformers"), {"F32"}),
    "int8": (quantized({"load_in_8bit": True}), {"BF16"}),
    "NF4, ZeRO-2": (sharded(quantized(NF4, activation_checkpointing=True), zero_stage=2), {"BF16"}),
    "int8, ZeRO-2": (sharded(quantized({"load_in_8bit": True}), zero_stage=2), {"BF16"}),
    "ZeRO-0": (sharded({}, zero_stage=0), {"F32"}),
    "ZeRO-1": (sharded({}, zero_stage=1, reduce_bucket_size=1000), {"F32"}),
    "ZeRO-2, offloaded": (sharded({}, zero_stage=2, offload_optimizer=True), {"F32"}),
    "ZeRO-2, cast to bf16": (sharded(BF16, zero_stage=2), {"BF16"}),
    "ZeRO-2, float32 adapters": (sharded(BF16, zero_stage=2, torch_autocast=True), {"F32"}),
    "ZeRO-3": (sharded({}, zero_stage=3), {"F32"}),
    "ZeRO-3, float32 adapters": (sharded(BF16, zero_stage=3, torch_autocast=True), {"F32"}),
    "8-bit Adam": ({"training": {"optim": "adamw_bnb_8bit"}}, {"F32"}),
    "two layers, orthogonal": ({"lora": {"layers_to_transform": [0, 2], "init_lora_weights": "orthogonal"}}, {"F32"}),
    "device map": ({"model": {"device_map": "auto", "low_cpu_mem_usage": True}}, {"F32"}),
    "JAX names": ({"lora": {"target_modules": ".*q_einsum|.*kv_einsum|.*attn_vec_einsum|.*gate_proj"}}, {"F32"}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_trains_and_learns(case: str, ranks: RankServer, make_run: Callable[..., Run]) -> None:
    sections, dtypes = CASES[case]
    training = {"max_steps": 3, "save_steps": 3, **sections.get("training", {})}
    run = make_run("case-1", **{**sections, "training": training})
    count = sections.get("resources", {}).get("gpus_per_node", 1)
    assert ranks.start(run, count).wait() == [0] * count, read_logs(run)
    losses = [row["eval_loss"] for row in load_metrics(run) if row["kind"] == "eval"]
    assert len(losses) == 2
    assert losses[1] < losses[0] - 0.05
    assert read_dtypes(run) == dtypes


def test_an_adapter_is_where_the_spec_says(ranks: RankServer, make_run: Callable[..., Run]) -> None:
    from safetensors import safe_open

    lora = {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "exclude_modules": ["up_proj"]}
    run = make_run("placed-1", lora=lora, training={"max_steps": 1})
    assert ranks.start(run, 1).wait() == [0], read_logs(run)
    with safe_open(run.adapter / "adapter_model.safetensors", "np") as tensors:
        names = sorted(tensors.keys())
    prefix = "base_model.model.model.layers.1.self_attn.q_proj"
    assert names == [f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"]


def test_a_compiled_model_leaves_a_plain_adapter(ranks: RankServer, make_run: Callable[..., Run]) -> None:
    """Rows of one length and no evaluation: one graph to compile."""
    training = {"max_steps": 2, "torch_compile": True, "trainer": "transformers"}
    data = {"pad_to_multiple_of": 160, "eval": None}
    run = make_run("compiled-1", data=data, training=training, lora={"target_modules": ["q_proj"]})
    plain = make_run("plain-1", data=data, training={**training, "torch_compile": False}, lora={"lora_dropout": 0.0})
    assert ranks.start(run, 1).wait() == [0], read_logs(run)
    assert ranks.start(plain, 1).wait() == [0], read_logs(plain)
    first, second = (next(row["loss"] for row in load_metrics(each) if row["kind"] == "train") for each in (run, plain))
    assert first == pytest.approx(second, rel=1e-4)  # before the first step, where the adapter adds nothing
    assert read_dtypes(run) == {"F32"}


@pytest.mark.filterwarnings("ignore")
def test_a_mesh_of_data_parallel_devices_trains_as_one_of_sharded_ones(
    ranks: RankServer, make_run: Callable[..., Run]
) -> None:
    found = []
    for axis, stage in (("dp", None), ("fsdp", 3)):
        training = {"max_steps": 2, "save_steps": 2}
        resources = {"mesh_shape": [[2, 1], [axis, "tp"]]}
        run = make_run(f"{axis}-1", training=training, resources=resources, lora={"lora_dropout": 0.0})
        assert ranks.start(run, 2).wait() == [0, 0], read_logs(run)
        zero = json.loads(run.deepspeed_path.read_text())["zero_optimization"] if run.deepspeed_path.exists() else {}
        assert zero.get("stage") == stage
        rows = load_metrics(run)
        assert next(row for row in rows if row.get("event") == "started")["world_size"] == 2
        found.append([row["loss"] for row in rows if row["kind"] == "train"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_fp16_without_a_gpu_is_refused(ranks: RankServer, make_run: Callable[..., Run]) -> None:
    run = make_run("half-1", training={"fp16": True})
    assert ranks.start(run, 1).wait() == [5]
    assert "training.fp16 needs a GPU" in (load_attempts(run)[0].reason or "")


@pytest.mark.filterwarnings("ignore")
def test_tf32_can_be_read_by_older_and_newer_names_whatever_the_trainer_set() -> None:
    """transformers takes torch's newer switch, after which the older ones raise where torch.compile reads them."""
    import torch
    from transformers.utils.import_utils import enable_tf32

    from lora_jobs.training.arguments import set_tf32

    try:
        for enabled, older in ((True, "high"), (False, "highest")):
            for before in (True, False):
                enable_tf32(before)
                set_tf32(enabled)
                assert torch.get_float32_matmul_precision() == older
                assert torch.backends.cuda.matmul.allow_tf32 is enabled
                assert torch.backends.cudnn.allow_tf32 is enabled
    finally:
        torch.backends.fp32_precision = "none"
        set_tf32(False)


@pytest.mark.filterwarnings("ignore")
def test_a_quantized_models_adapters_are_widened_for_the_gradient_scaler() -> None:
    import torch

    from lora_jobs.training.model import widen_adapters

    layer = torch.nn.Linear(4, 2, dtype=torch.bfloat16)
    layer.bias.requires_grad_(False)
    widen_adapters(layer)  # type: ignore[arg-type] # any module will do
    assert (layer.weight.dtype, layer.bias.dtype) == (torch.float32, torch.bfloat16)
