"""Every file of jobs/ and envs/ loads, fits its cluster's limits, and says what issue and sources ask for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lora_jobs.spec import (
    find_resource_problems,
    list_environments,
    list_variants,
    load_environment,
    load_spec,
    parse_spec,
    render_spec,
)

ROOT = Path(__file__).resolve().parents[3]
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_the_shipped_jobs() -> None:
    assert [path.stem for path in JOBS] == [
        "gemma2_9b_svg",
        "gemma3_1b",
        "gemma3_270m",
        "gemma3_4b",
        "llama32_3b_climate_qlora",
        "smollm2_135m_svg",
        "tiny_gemma2",
    ]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_loads_and_fits_its_cluster(path: Path) -> None:
    spec = load_spec(path)
    assert spec.name == path.stem
    environment = load_environment(str(ROOT / "envs" / f"{spec.resources.cluster}.yaml"))
    assert find_resource_problems(spec.resources, environment) == []
    assert parse_spec(render_spec(spec), source="stored") == spec
    assert list_variants(spec) == [spec]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_commented_sweep_works_when_uncommented(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    uncommented = re.sub(r"^# (sweep:|  lora\.r:)", r"\1", text, flags=re.MULTILINE)
    assert len(list_variants(parse_spec(uncommented, source="f"))) == (1 if uncommented == text else 3)


def test_gemma2_9b_svg() -> None:
    spec = load_spec(ROOT / "jobs/gemma2_9b_svg.yaml")
    assert spec.model.name_or_path == "google/gemma-2-9b-it"
    assert spec.model.revision == "11c9b309abf73637e4b6f9a3fa1e92e615547819"
    lora = spec.lora
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules) == (64, 128, 0.1, SEVEN)
    assert lora.modules_to_save == ("embed_tokens", "lm_head")
    assert spec.data.format == "svg_caption"
    assert {
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine_with_restarts",
        "warmup_ratio": 0.05,
        "weight_decay": 0.01,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-8,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 16,
        "max_grad_norm": 0.5,
        "eval_steps": 10,
        "save_steps": 10,
        "logging_steps": 1,
        "early_stopping_patience": 10,
        "early_stopping_threshold": 0.0005,
        "load_best_model_at_end": True,
        "optim": "adamw_torch_fused",
        "activation_checkpointing": True,
        "bf16": True,
        "torch_empty_cache_steps": 10,
        "dataloader_num_workers": 2,
    }.items() <= spec.training.model_dump().items()
    assert spec.deepspeed is not None
    assert spec.deepspeed.model_dump() == {
        "zero_stage": 2,
        "offload_optimizer": False,
        "allgather_bucket_size": 500_000_000,
        "reduce_bucket_size": 500_000_000,
        "overlap_comm": False,
        "torch_autocast": False,
        "contiguous_gradients": True,
    }
    assert (spec.resources.cluster, spec.resources.partition) == ("leonardo", "boost_usr_prod")
    assert spec.resources.world_size == 2


@pytest.mark.parametrize(
    ("size", "r", "batch", "gpu"), [("270m", 32, 1, "2080Ti"), ("1b", 32, 4, "A6000"), ("4b", 64, 8, "H100-80")]
)
def test_gemma3(size: str, r: int, batch: int, gpu: str) -> None:
    spec = load_spec(ROOT / f"jobs/gemma3_{size}.yaml")
    assert (spec.lora.r, spec.lora.alpha) == (r, r)
    assert spec.training.per_device_train_batch_size == batch
    assert spec.resources.gpu == gpu


def test_gemma3_4b_leaves_the_vision_tower_alone() -> None:
    expression = load_spec(ROOT / "jobs/gemma3_4b.yaml").lora.target_modules
    assert isinstance(expression, str)
    names = [f"model.language_model.layers.0.self_attn.{name}" for name in SEVEN[:4]]
    names += [f"model.layers.0.mlp.{name}" for name in SEVEN[4:]]
    assert all(re.fullmatch(expression, name) for name in names)
    assert not re.fullmatch(expression, "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj")


def test_llama32_3b_climate_qlora() -> None:
    spec = load_spec(ROOT / "jobs/llama32_3b_climate_qlora.yaml")
    quantization = spec.model.quantization
    assert quantization is not None
    assert (quantization.load_in_4bit, quantization.bnb_4bit_quant_type) == (True, "nf4")
    assert quantization.bnb_4bit_use_double_quant is True
    lora, training = spec.lora, spec.training
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules) == (8, 32, 0.1, ("q_proj", "v_proj"))
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (7, 2048)
    assert (training.per_device_eval_batch_size, training.eval_accumulation_steps) == (10, 2048)
    assert (training.bf16, training.num_train_epochs, training.activation_checkpointing) == (True, 3, True)
    assert (spec.data.pad_to_multiple_of, spec.resources.world_size) == (16, 1)


def test_the_jobs_that_run_here() -> None:
    demo = load_spec(ROOT / "jobs/smollm2_135m_svg.yaml")
    assert (demo.model.name_or_path, demo.model.dtype) == ("models/smollm2_135m_instruct", "float32")
    assert (demo.data.train, demo.data.eval) == ("data/fontawesome/train.jsonl", "data/fontawesome/eval.jsonl")
    assert (demo.data.format, demo.resources.cluster) == ("svg_caption", "local")
    tiny = load_spec(ROOT / "jobs/tiny_gemma2.yaml")
    assert tiny.model.name_or_path == "models/tiny_gemma2"
    assert tiny.deepspeed is not None
    assert (tiny.deepspeed.zero_stage, tiny.resources.world_size, tiny.model.dtype) == (2, 2, "float32")
    assert (tiny.training.max_steps, tiny.training.save_steps) == (12, 4)


def test_the_shipped_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("LORA_JOBS_ENVS", raising=False)
    assert [environment.name for environment in list_environments()[0]] == ["leonardo", "local"]
    leonardo = load_environment("leonardo")
    assert leonardo.account_required is True
    assert leonardo.default_partition == "boost_usr_prod"
    assert leonardo.environment["HF_HUB_OFFLINE"] == leonardo.environment["TRANSFORMERS_OFFLINE"] == "1"
    partition = leonardo.partitions["boost_usr_prod"]
    assert (partition.gpu, partition.gpus_per_node, partition.cpus_per_node) == ("A100-64", 4, 32)
    assert (partition.mem_per_node, partition.max_time) == ("494000M", "24:00:00")
    assert partition.qos["boost_qos_dbg"].model_dump() == {"max_time": "00:30:00", "max_nodes": 2}


def test_the_constraints_are_exact() -> None:
    lines = (ROOT / "envs/constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9.]*", pin) for pin in pins)
    assert len({pin.lower() for pin in pins}) == len(pins)
    assert "torch==2.13.0" in pins
    packages = {pin.partition("==")[0] for pin in pins}
    assert {
        "transformers",
        "peft",
        "accelerate",
        "deepspeed",
        "trl",
        "bitsandbytes",
        "datasets",
        "submitit",
    } <= packages
