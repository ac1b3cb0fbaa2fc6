"""The closed form of `check` against a trace of the real training code: `make bench-memory`.

Every row is a job; the numbers are torch's allocated bytes on one GPU. Results: benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from lora_jobs.sizing import MODELS, ModelShape, find_gpu, find_shape
from lora_jobs.sizing.instants import list_instants
from lora_jobs.sizing.precision import choose_precision
from lora_jobs.sizing.state import compute_state
from lora_jobs.spec import JobSpec, parse_spec

if TYPE_CHECKING:
    from collections.abc import Iterator

RESULTS = Path(__file__).parent / "results" / "memory.json"
STRETCHES = {
    "forward": ("layer_forward",),
    "loss_forward": ("loss_forward",),
    "loss_backward": ("loss_backward", "head_backward"),
    "first_layer_backward": ("first_layer_backward",),
    "last_layer_backward": ("last_layer_backward", "embedding_backward"),
    "optimizer_step": ("optimizer_step",),
    "evaluation_layer": ("evaluation_layer",),
    "evaluation_loss": ("evaluation_loss",),
}
"""The trace's instants, and the closed form's that fall into them."""


def build_spec(model: str, **changes: Any) -> JobSpec:
    """A small bf16 job of `model` with dotted changes such as training__trainer."""
    values: dict[str, Any] = {
        "name": "row",
        "model": {"name_or_path": model},
        "lora": {"r": 16, "lora_dropout": 0.05},
        "data": {"train": "train.jsonl", "max_length": 1024},
        "training": {"max_steps": 1, "bf16": True},
    }
    for key, value in changes.items():
        section, field = key.split("__")
        values.setdefault(section, {})[field] = value
    return parse_spec(json.dumps(values), source="row")


KNOB_MODELS = ("gemma-3-270m", "llama-3.2-1b", "phi-4-mini")
"""Small models of unlike families, for the rarer knobs: norms of heads and windows; plain; fused projections."""


def list_tested_rows() -> dict[str, JobSpec]:
    """What the tests trace, too: every model once by the main knobs in turn, every other knob on one of KNOB_MODELS."""
    turns = zip(VARIANTS.items(), itertools.cycle(KNOB_MODELS), strict=False)
    return list_model_rows(0) | {f"{model} {name}": build_spec(model, **changes) for (name, changes), model in turns}


def list_rows() -> dict[str, JobSpec]:
    """Every model by the main knobs three times over, no two alike; every other knob on KNOB_MODELS."""
    return list_model_rows(0) | list_model_rows(1) | list_model_rows(2) | list_variants(KNOB_MODELS)


def list_model_rows(turn: int) -> dict[str, JobSpec]:
    """Every model once: kernel, loss and checkpointing change from model to model, and from turn to turn."""
    rows: dict[str, JobSpec] = {}
    for number, shape in enumerate(MODELS, start=3 * turn):
        kernels = list_kernels(shape)
        trainer = ("trl", "transformers")[number // 2 % 2]
        rows |= build_row(shape.name, kernels[number % len(kernels)], trainer, checkpointing=number // 4 % 2 == 0)
    return rows


def list_kernels(shape: ModelShape) -> list[str]:
    """The attention implementations that transformers takes for a model."""
    return ["eager"] if shape.traits.attention_soft_cap else ["sdpa", "eager"]


def build_row(model: str, kernel: str, trainer: str, *, checkpointing: bool) -> dict[str, JobSpec]:
    """One row of the main knobs, by its name."""
    name = f"{model} {kernel} {trainer} {'checkpointing' if checkpointing else 'all saved'}"
    return {
        name: build_spec(
            model,
            model__attn_implementation=kernel,
            training__trainer=trainer,
            training__activation_checkpointing=checkpointing,
        )
    }


def list_variants(models: tuple[str, ...]) -> dict[str, JobSpec]:
    """Every variant on each of these models."""
    return {f"{model} {name}": build_spec(model, **VARIANTS[name]) for model in models for name in VARIANTS}


SAVED = ("embed_tokens", "lm_head")
ALL_SAVED = {"training__activation_checkpointing": False}
EVALUATED = {"data__eval": "eval.jsonl", "training__eval_steps": 1, "training__per_device_eval_batch_size": 8}
STOCK = {"training__trainer": "transformers"}
AUTOCAST = {"deepspeed__zero_stage": 2, "deepspeed__torch_autocast": True}
FLASH = {"model__attn_implementation": "flash_attention_2"}
NF4 = {"model__quantization": {"load_in_4bit": True}}
DOUBLE = {"model__quantization": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}}
FP4 = {"model__quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}}
INT8 = {"model__quantization": {"load_in_8bit": True}}
VARIANTS: dict[str, dict[str, Any]] = {
    "no dropout": {"lora__lora_dropout": 0.0},
    "no dropout, all saved": {"lora__lora_dropout": 0.0, **ALL_SAVED},
    "batch 4 of 512": {"training__per_device_train_batch_size": 4, "data__max_length": 512},
    "batch 4 of 512, all saved": {
        "training__per_device_train_batch_size": 4, "data__max_length": 512, **ALL_SAVED,
    },
    "4096 tokens": {"data__max_length": 4096},
    "8192 tokens, stock loss": {"data__max_length": 8192, **STOCK},
    "flash_attention_2": FLASH,
    "flash_attention_2, all saved": {**FLASH, **ALL_SAVED},
    "q and v": {"lora__target_modules": r".*\.(q_proj|v_proj|qkv_proj)"},
    "r 64, accumulation": {"lora__r": 64, "training__gradient_accumulation_steps": 4},
    "rank patterns": {"lora__rank_pattern": {"o_proj": 64, "down_proj": 4}, "lora__alpha_pattern": {"o_proj": 128}},
    "trained tokens, stock loss": {"lora__trainable_token_indices": [5, 7], **STOCK},
    "DoRA": {"lora__use_dora": True},
    "DoRA, all saved": {"lora__use_dora": True, **ALL_SAVED},
    "half adapters": {"lora__autocast_adapter_dtype": False},
    "half adapters, all saved": {"lora__autocast_adapter_dtype": False, **ALL_SAVED},
    "foreach": {"training__optim": "adamw_torch"},
    "8-bit Adam": {"training__optim": "adamw_bnb_8bit", "lora__r": 128},
    "paged 8-bit Adam": {"training__optim": "paged_adamw_8bit", "lora__r": 128},
    "no autocast": {"training__bf16": False},
    "fp16": {"training__bf16": False, "training__fp16": True, "model__dtype": "float16"},
    "fp32 base": {"model__dtype": "float32"},
    "modules_to_save": {"lora__modules_to_save": list(SAVED)},
    "modules_to_save, stock loss": {"lora__modules_to_save": list(SAVED), **STOCK},
    "modules_to_save, tied": {"lora__modules_to_save": list(SAVED), "lora__ensure_weight_tying": True},
    "packing, batch 2": {"data__packing": True, "training__per_device_train_batch_size": 2},
    "ZeRO-1": {"deepspeed__zero_stage": 1},
    "ZeRO-2": {"deepspeed__zero_stage": 2},
    "ZeRO-2, no dropout, all saved": {"deepspeed__zero_stage": 2, "lora__lora_dropout": 0.0, **ALL_SAVED},
    "ZeRO-2, torch_autocast": AUTOCAST,
    "ZeRO-2, torch_autocast, all saved": {**AUTOCAST, **ALL_SAVED},
    "ZeRO-0": {"deepspeed__zero_stage": 0},
    "ZeRO-2, offload": {"deepspeed__zero_stage": 2, "deepspeed__offload_optimizer": True},
    "ZeRO-2, fp16": {
        "deepspeed__zero_stage": 2, "training__bf16": False, "training__fp16": True, "model__dtype": "float16",
    },
    "padded to 64": {"data__pad_to_multiple_of": 64, "data__max_length": 1000},
    "DDP over 2": {"resources__gpus_per_node": 2},
    "evaluation of 8": EVALUATED,
    "evaluation of 8, stock loss": {**EVALUATED, **STOCK},
    "NF4": {**NF4, **EVALUATED},
    "NF4, all saved": {**NF4, **ALL_SAVED},
    "NF4, stock loss": {**NF4, **STOCK, **EVALUATED},
    "NF4, stock loss, all saved": {**NF4, **STOCK, **ALL_SAVED},
    "NF4, no dropout": {**NF4, "lora__lora_dropout": 0.0},
    "NF4, double quantization": DOUBLE,
    "NF4, double quantization, ZeRO-2": {**DOUBLE, "deepspeed__zero_stage": 2},
    "FP4, 4096 tokens": {**FP4, "data__max_length": 4096},
    "int8": {**INT8, **EVALUATED},
    "int8, all saved": {**INT8, **ALL_SAVED},
    "int8, stock loss": {**INT8, **STOCK},
}  # fmt: skip


class Tracer:
    """A process that traces, one row after another."""

    def __init__(self) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "lora_jobs.training.trace"]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 # as long as the process
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )

    def trace(self, spec: JobSpec) -> dict[str, Any]:
        """The trace of a job, or {"error": ...}."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"spec": spec.to_values()}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            said = self.log.read()[-2000:]
            raise RuntimeError(f"the tracing process ended with {self.process.wait()}: {said}")
        return dict(json.loads(line))

    def close(self) -> None:
        """Let it end."""
        with self.log, self.process:
            assert self.process.stdin is not None
            self.process.stdin.close()


def trace_all(rows: dict[str, JobSpec]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row's name and trace, in order, by as many processes as there are cores (at most four)."""
    idle: SimpleQueue[Tracer] = SimpleQueue()
    servers = [Tracer() for _ in range(TRACERS)]
    for server in servers:
        idle.put(server)

    def trace(spec: JobSpec) -> dict[str, Any]:
        server = idle.get()
        try:
            return server.trace(spec)
        finally:
            idle.put(server)

    with ThreadPoolExecutor(TRACERS) as pool:
        yield from zip(rows, pool.map(trace, rows.values()), strict=True)
    for server in servers:
        server.close()


TRACERS = min(4, os.cpu_count() or 1)


def predict(spec: JobSpec) -> dict[str, int]:
    """The closed form's bytes, by the trace's instants."""
    found = {
        instant.name: instant.total
        for instant in list_instants(spec, find_shape(spec.model.name_or_path), find_gpu("a100-64"))
    }
    return {
        stretch: max(found[name] for name in names if name in found)
        for stretch, names in STRETCHES.items()
        if any(name in found for name in names)
    }


def predict_components(spec: JobSpec) -> dict[str, int]:
    """The closed form's bytes of what stays through a step, by the trace's names; a trained bias is in the base."""
    state = compute_state(spec, find_shape(spec.model.name_or_path), choose_precision(spec))
    return {
        "base_weights": state.base,
        "trainable_weights": state.trainable,
        "optimizer_state": state.optimizer,
        "gradients": state.gradients,
    }


def compare(spec: JobSpec, traced: dict[str, Any]) -> dict[str, Any]:
    """Traced and predicted peak, their difference in percent, and that of every instant and of what stays."""
    predicted, held = predict(spec), predict_components(spec)
    peak = max(predicted.values())
    return {
        "traced_bytes": traced["peak_bytes"],
        "predicted_bytes": peak,
        "error_percent": round(100 * (peak / traced["peak_bytes"] - 1), 4),
        "binding": max(traced["instants"], key=traced["instants"].__getitem__),
        "instants_percent": {
            name: round(100 * (predicted[name] / seen - 1), 3)
            for name, seen in traced["instants"].items()
            if name in predicted and not (spec.deepspeed and name == "optimizer_step")  # computed, not traced
        },
        "components_percent": {
            name: round(100 * (held[name] / seen - 1), 3) for name, seen in traced["components"].items() if seen
        },
    }


def summarize(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Rows, mean and worst error of the peak in percent, and the same of every instant and every component alone."""
    errors = [abs(row["error_percent"]) for row in results.values()]
    return {
        "rows": len(errors),
        "mean_percent": round(statistics.mean(errors), 4),
        "worst_percent": max(errors),
        "worst_row": max(results, key=lambda name: abs(results[name]["error_percent"])),
        "instants": _summarize_each([row["instants_percent"] for row in results.values()]),
        "components": _summarize_each([row["components_percent"] for row in results.values()]),
    }


def _summarize_each(rows: list[dict[str, float]]) -> dict[str, Any]:
    by_name: dict[str, list[float]] = {}
    for row in rows:
        for name, percent in row.items():
            by_name.setdefault(name, []).append(abs(percent))
    return {
        name: {"rows": len(seen), "mean_percent": round(statistics.mean(seen), 4), "worst_percent": max(seen)}
        for name, seen in by_name.items()
    }


FITTED = (
    "Read off traces, not derived: the temporaries of an MLP's backward pass (six rows of _MLP_BACKWARD in "
    "sizing/layers.py, found on Llama 3.2 and Gemma 2; sizing/quantized.py, found on Llama 3.2 1B, Gemma 3 270M "
    "and Phi 4 mini) and of a layer in evaluation; the copies of a gradient beside DoRA. Everything else is counted "
    "from the libraries' code. Qwen3, Phi, SmolLM3, Mistral Nemo and Small, Llama 3.3 and Gemma 3 12B and 27B came "
    "later and changed none of the former."
)


def main() -> None:
    """Print a line a row and the summary; write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows whose name holds this")
    only = parser.parse_args().only
    rows = {name: spec for name, spec in list_rows().items() if only in name}
    results: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    for name, traced in trace_all(rows):
        if "error" in traced:
            refused[name] = traced["error"]
            print(f"{name:60} {traced['error']}")
            continue
        results[name] = row = compare(rows[name], traced)
        gib = row["traced_bytes"] / 2**30
        print(f"{name:60} {gib:8.2f} GiB {row['error_percent']:+8.3f} %  {row['binding']}", flush=True)
    if not results:
        sys.exit("no row was traced")
    summary = summarize(results)
    print(json.dumps(summary, indent=1))
    if not only:
        document = {"summary": summary, "fitted": FITTED, "refused": refused, "rows": results}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
