"""The closed form of `check` against a trace of the real training code: `make bench-memory`.

Every row is a job; the numbers are torch's allocated bytes on one GPU. Results: benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lora_jobs.sizing import MODELS, find_gpu, find_shape
from lora_jobs.sizing.instants import list_instants
from lora_jobs.spec import JobSpec, parse_spec

RESULTS = Path(__file__).parent / "results" / "memory.json"
LOG = Path(tempfile.gettempdir()) / "lora-jobs-trace.log"
STRETCHES = {
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


def list_rows() -> dict[str, JobSpec]:
    """Every model of the table by its main knobs, then the rarer knobs on one model of each family."""
    rows: dict[str, JobSpec] = {}
    for shape in MODELS:
        kernels = ["eager"] if shape.model_type == "gemma2" else ["eager", "sdpa"]
        for kernel, trainer, checkpointing in itertools.product(kernels, ("trl", "transformers"), (True, False)):
            name = f"{shape.name} {kernel} {trainer} {'checkpointing' if checkpointing else 'all saved'}"
            rows[name] = build_spec(
                shape.name,
                model__attn_implementation=kernel,
                training__trainer=trainer,
                training__activation_checkpointing=checkpointing,
            )
    for name, changes in VARIANTS.items():
        for model in ("gemma-2-2b", "gemma-3-1b", "llama-3.2-1b", "qwen2.5-7b", "mistral-7b-v0.3"):
            rows[f"{model} {name}"] = build_spec(model, **changes)
    return rows


SAVED = ("embed_tokens", "lm_head")
VARIANTS: dict[str, dict[str, Any]] = {
    "no dropout": {"lora__lora_dropout": 0.0},
    "no dropout, all saved": {"lora__lora_dropout": 0.0, "training__activation_checkpointing": False},
    "batch 4 of 512": {"training__per_device_train_batch_size": 4, "data__max_length": 512},
    "batch 4 of 512, all saved": {
        "training__per_device_train_batch_size": 4, "data__max_length": 512,
        "training__activation_checkpointing": False,
    },
    "4096 tokens": {"data__max_length": 4096},
    "8192 tokens, stock loss": {"data__max_length": 8192, "training__trainer": "transformers"},
    "q and v": {"lora__target_modules": ["q_proj", "v_proj"]},
    "r 64, accumulation": {"lora__r": 64, "training__gradient_accumulation_steps": 4},
    "foreach": {"training__optim": "adamw_torch"},
    "no autocast": {"training__bf16": False},
    "fp16": {"training__bf16": False, "training__fp16": True, "model__dtype": "float16"},
    "fp32 base": {"model__dtype": "float32"},
    "modules_to_save": {"lora__modules_to_save": list(SAVED)},
    "modules_to_save, stock loss": {"lora__modules_to_save": list(SAVED), "training__trainer": "transformers"},
    "ZeRO-2": {"deepspeed__zero_stage": 2},
    "ZeRO-2, no dropout, all saved": {
        "deepspeed__zero_stage": 2, "lora__lora_dropout": 0.0, "training__activation_checkpointing": False,
    },
    "evaluation of 8": {
        "data__eval": "eval.jsonl", "training__eval_steps": 1, "training__per_device_eval_batch_size": 8,
    },
    "evaluation of 8, stock loss": {
        "data__eval": "eval.jsonl", "training__eval_steps": 1, "training__per_device_eval_batch_size": 8,
        "training__trainer": "transformers",
    },
}  # fmt: skip


class Tracer:
    """A process that traces, one row after another."""

    def __init__(self) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "lora_jobs.training.trace"]
        with LOG.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def trace(self, spec: JobSpec) -> dict[str, Any]:
        """The trace of a job, or {"error": ...}."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"spec": spec.to_values()}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the tracing process ended with {self.process.wait()}")
        return dict(json.loads(line))

    def close(self) -> None:
        """Let it end."""
        with self.process:
            assert self.process.stdin is not None
            self.process.stdin.close()


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


def compare(spec: JobSpec, traced: dict[str, Any]) -> dict[str, Any]:
    """Traced and predicted peak, their difference in percent, and that of every instant."""
    predicted = predict(spec)
    peak = max(predicted.values())
    return {
        "traced_bytes": traced["peak_bytes"],
        "predicted_bytes": peak,
        "error_percent": round(100 * (peak / traced["peak_bytes"] - 1), 4),
        "binding": max(traced["instants"], key=traced["instants"].__getitem__),
        "instants_percent": {
            name: round(100 * (predicted[name] / seen - 1), 3)
            for name, seen in traced["instants"].items()
            if name in predicted
        },
    }


def main() -> None:
    """Print a line a row and the summary; write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows whose name holds this")
    only = parser.parse_args().only
    tracer, results = Tracer(), {}
    for name, spec in list_rows().items():
        if only not in name:
            continue
        begun = time.monotonic()
        traced = tracer.trace(spec)
        if "error" in traced:
            print(f"{name:60} {traced['error']}")
            continue
        results[name] = row = compare(spec, traced)
        print(
            f"{name:60} {row['traced_bytes'] / 2**30:8.2f} GiB {row['error_percent']:+8.3f} %  {row['binding']}"
            f"  {time.monotonic() - begun:.1f} s",
            flush=True,
        )
    tracer.close()
    if not results:
        sys.exit("no row was traced")
    errors = [abs(row["error_percent"]) for row in results.values()]
    summary = {"rows": len(errors), "mean_percent": statistics.mean(errors), "worst_percent": max(errors)}
    print(summary)
    if not only:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({"summary": summary, "rows": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
