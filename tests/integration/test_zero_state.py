"""What sizing says that DeepSpeed holds on a rank, and the real engine's tensors: two ranks over gloo, a tiny model.

On a CPU the engine makes the tensors that it makes on a GPU; what differs are streams and pinned memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from tiny_runs import HERE

from lora_jobs.sizing import find_shape
from lora_jobs.sizing.precision import choose_precision
from lora_jobs.sizing.state import compute_state
from lora_jobs.spec import JobSpec, parse_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.train

RANKS = 2
BUCKET = 5000
"""Elements; the gradients are 8,192, a bit less than two buckets."""
STEP_COUNTERS = 8
"""Bytes: Adam's."""
NORMS = 512
"""Bytes: the counters, and the fp64 norm of each gradient."""
MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
"""Two equal layers: the border between the ranks' shares is the one between the layers."""

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "ZeRO-2": {},
    "ZeRO-2, overlap_comm": {"deepspeed": {"overlap_comm": True}},
    "ZeRO-2, not contiguous": {"deepspeed": {"contiguous_gradients": False}},
    "ZeRO-2, not contiguous, overlap_comm": {"deepspeed": {"contiguous_gradients": False, "overlap_comm": True}},
    "ZeRO-2, one bucket for all": {"deepspeed": {"reduce_bucket_size": 1_000_000}},
    "ZeRO-2, accumulation": {"training": {"gradient_accumulation_steps": 2}},
    "ZeRO-2, foreach": {"training": {"optim": "adamw_torch"}},
    "ZeRO-2, torch_autocast": {"deepspeed": {"torch_autocast": True}},
    "ZeRO-2, torch_autocast, DoRA": {"deepspeed": {"torch_autocast": True}, "lora": {"use_dora": True}},
    "ZeRO-2, trained embedding": {"lora": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}},
    "ZeRO-2, two trained embeddings": {"lora": {"modules_to_save": ["embed_tokens", "lm_head"]}},
    "ZeRO-2, torch_autocast, two trained embeddings": {
        "deepspeed": {"torch_autocast": True},
        "lora": {"modules_to_save": ["embed_tokens", "lm_head"]},
    },
    "ZeRO-1": {"deepspeed": {"zero_stage": 1}},
    "ZeRO-1, accumulation": {"deepspeed": {"zero_stage": 1}, "training": {"gradient_accumulation_steps": 2}},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps(MODEL), encoding="utf-8")
    return directory


def build_spec(model: Path, changes: dict[str, dict[str, Any]]) -> JobSpec:
    values: dict[str, dict[str, Any]] = {
        "model": {"name_or_path": str(model)},
        "lora": {"r": 4, "lora_dropout": 0.0},
        "data": {"train": "train.jsonl", "max_length": 64},
        "training": {"max_steps": 2, "bf16": True, "activation_checkpointing": False},
        "deepspeed": {"zero_stage": 2, "reduce_bucket_size": BUCKET},
        "resources": {"gpus_per_node": RANKS},
    }
    changed = {section: {**fields, **changes.get(section, {})} for section, fields in values.items()}
    return parse_spec(json.dumps({"name": "zero", **changed}), source="case")


@pytest.fixture(scope="module")
def measure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[JobSpec], dict[str, int]]]:
    """The most bytes that any rank holds, by the real engine."""
    directory = tmp_path_factory.mktemp("ranks")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TRANSFORMERS_VERBOSITY": "error",
        "TORCH_EXTENSIONS_DIR": str(directory / "extensions"),
    }
    path = directory / "ranks.log"
    with path.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(HERE / "zero_ranks.py"), str(RANKS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )

        def ask(spec: JobSpec) -> dict[str, int]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(spec.to_values()) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            assert line, path.read_text()[-3000:]
            return dict(json.loads(line))

        with process:
            yield ask
            assert process.stdin is not None
            process.stdin.close()


@pytest.mark.parametrize("name", CASES)
def test_a_rank_holds_what_sizing_says(name: str, model: Path, measure: Callable[[JobSpec], dict[str, int]]) -> None:
    spec = build_spec(model, CASES[name])
    state = compute_state(spec, find_shape(str(model)), choose_precision(spec))
    held = measure(spec)
    assert held["trainable"] == state.trainable
    assert 0 <= held["optimizer"] - state.optimizer <= STEP_COUNTERS
    assert held["gradients"] == state.gradients
    assert held["accumulated"] == state.accumulated
    assert 0 <= held["step"] - (state.gradients + state.step_transient) <= NORMS
    if state.partition and held["partition"]:  # ZeRO-1 makes one when the backward pass has ended
        assert held["partition"] == state.partition
    # In the backward pass: a gradient just made is there before it is in a bucket.
    newest = max(4 * 128 * choose_precision(spec).adapter, state.embedding_gradient)  # elements of the largest adapter
    whole = sum_gradients(spec, state.gradients)
    growing = int(whole * state.growing)
    if spec.deepspeed is not None and spec.deepspeed.contiguous_gradients:
        assert held["reduce_buckets"] == state.reduce_buckets
        assert held["backward_gradients"] <= state.accumulated + growing + newest
    else:
        assert held["reduce_buckets"] == 0
        most = growing + state.reduce_buckets
        assert 0.9 * most <= held["backward_gradients"] <= most + newest


def sum_gradients(spec: JobSpec, share: int) -> int:
    """Of all ranks."""
    return share * spec.resources.world_size
