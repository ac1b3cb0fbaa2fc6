"""What a real GPU allocates, beside the closed form: `make bench-gpu`, on a machine with one.

A row is a process of its own: a random model of the real shape, two training steps, one evaluation, one save. It writes
allocated, reserved and device-used bytes and versions to benchmarks/results/gpu_memory.json after every row; a row that
fails, or whose packages are not there, is written with its reason and tried again the next time. At the end the rows
are judged: exit status 1 beyond the limits of gpu_judgement.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_judgement import find_reason_to_skip, is_measured, judge
from memory import DOUBLE, FLASH, INT8, NF4, build_spec, predict

from lora_jobs.sizing import detected_gpu, find_shape
from lora_jobs.sizing.margins import cautious_bytes
from lora_jobs.spec import JobSpec, parse_spec

if TYPE_CHECKING:
    from collections.abc import Callable

RESULTS = Path(__file__).parent / "results" / "gpu_memory.json"
ROW_SECONDS = 900
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "deepspeed", "bitsandbytes", "flash_attn")
EVALUATED = {"data__eval": "eval.jsonl", "training__eval_steps": 1}
MODELS = ("gemma-2-9b", "gemma-3-1b", "gemma-3-4b", "llama-3.2-3b", "llama-3.1-8b", "qwen2.5-7b")


def list_rows() -> dict[str, JobSpec]:
    """Models by checkpointing, loss and length; then attention, adapters' dtype, dropout, batches, modules_to_save,
    ZeRO-2 with one rank; and quantized bases, in pairs with the same job in bf16 above.
    """
    rows = {}
    for model, trainer, checkpointing, length in itertools.product(
        MODELS, ("trl", "transformers"), (True, False), (1024, 4096)
    ):
        name = f"{model} {trainer} {'checkpointing' if checkpointing else 'all saved'} {length}"
        rows[name] = build_spec(
            model,
            training__trainer=trainer,
            training__activation_checkpointing=checkpointing,
            data__max_length=length,
            **EVALUATED,
        )
    for model in ("gemma-3-1b", "llama-3.2-3b"):
        for name, changes in {
            "8192 tokens": {"data__max_length": 8192},
            "eager": {"model__attn_implementation": "eager"},
            "flash_attention_2": FLASH,
            "no dropout": {"lora__lora_dropout": 0.0},
            "no autocast": {"training__bf16": False},
            "batch 4": {"training__per_device_train_batch_size": 4},
            "half adapters": {"lora__autocast_adapter_dtype": False},
            "modules_to_save": {"lora__modules_to_save": ["embed_tokens", "lm_head"]},
            "ZeRO-2": {"deepspeed__zero_stage": 2},
        }.items():
            rows[f"{model} {name}"] = build_spec(model, **changes, **EVALUATED)
    for model, trainer in itertools.product(("gemma-3-1b", "llama-3.2-3b", "qwen2.5-7b"), ("trl", "transformers")):
        for name, changes in {"NF4": NF4, "NF4, double quantization": DOUBLE, "int8": INT8}.items():
            rows[f"{model} {trainer} {name}"] = build_spec(model, training__trainer=trainer, **changes, **EVALUATED)
    return rows


def measure(spec: JobSpec) -> dict[str, Any]:
    """Two steps, an evaluation and a save on the GPU of this process; bytes."""
    import torch

    from lora_jobs.sizing.activations import evaluation_batch, training_batch
    from lora_jobs.training.trace import step
    from lora_jobs.training.trace.build import build_model, layer_kinds, load_config, with_layers

    found: dict[str, int] = {}

    def record(name: str) -> None:
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        found[f"{name}_allocated_bytes"] = torch.cuda.max_memory_allocated()
        found[f"{name}_reserved_bytes"] = torch.cuda.max_memory_reserved()
        found[f"{name}_device_used_bytes"] = total - free
        torch.cuda.reset_peak_memory_stats()

    config = load_config(spec.model.name_or_path)
    with torch.device("cuda"):
        model = build_model(spec, with_layers(config, layer_kinds(config)), random_weights=True)
        if spec.training.trainer == "trl":
            step.add_fused_lm_head(model.get_base_model(), outputs=step.FUSED_OUTPUTS)
        record("load")
        forward, finish = start_engine(spec, model) if spec.deepspeed else start_plain(spec, model)
        model.train()
        for _ in range(2):
            inputs = step.make_inputs(training_batch(spec))
            inputs["attention_mask"].fill_(1)
            if step.is_padded(spec, training_batch(spec)):
                inputs["attention_mask"][:, -1] = 0
            finish(step.compute_loss(spec, forward, inputs))
        record("train")
        model.eval()
        inputs = step.make_inputs(evaluation_batch(spec))
        inputs["attention_mask"].fill_(1)
        with torch.no_grad():
            step.compute_loss(spec, forward, inputs)
        record("evaluation")
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
        record("save")
    return {**found, "gpu": torch.cuda.get_device_name(), "gpu_bytes": torch.cuda.get_device_properties(0).total_memory}


def start_plain(spec: JobSpec, model: Any) -> tuple[Any, Callable[[Any], None]]:
    """The model as it is called, and backward pass with optimizer step."""
    from lora_jobs.training.trace import step

    optimizer, forward = step.prepare_optimizer(spec, model), step.wrap_forward(spec, model)

    def finish(loss: Any) -> None:
        loss.backward()
        step.take_step(spec, model, optimizer)
        optimizer.zero_grad()

    return forward, finish


def start_engine(spec: JobSpec, model: Any) -> tuple[Any, Callable[[Any], None]]:
    """The same by DeepSpeed's engine, one rank."""
    import deepspeed
    import torch

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    zero = {
        "stage": spec.deepspeed.zero_stage,
        "reduce_bucket_size": find_shape(spec.model.name_or_path).hidden_size ** 2,
    }
    settings = {
        "train_micro_batch_size_per_gpu": spec.training.per_device_train_batch_size,
        "zero_optimization": zero,
        "bf16": {"enabled": True},
        "gradient_clipping": spec.training.max_grad_norm,
        "zero_allow_untested_optimizer": True,
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(trained, lr=1e-4, fused=True), config=settings
    )

    def finish(loss: Any) -> None:
        engine.backward(loss)
        engine.step()

    return engine, finish


def list_predictions(only: str) -> None:
    """A line a row: the predicted bytes of training and of evaluation."""
    rows = {name: spec for name, spec in list_rows().items() if only in name}
    for name, spec in rows.items():
        predicted = predict(spec)
        train = max(size for key, size in predicted.items() if "evaluation" not in key)
        evaluation = max(size for key, size in predicted.items() if "evaluation" in key)
        print(f"{name:50} {train / 2**30:8.2f} GiB training {evaluation / 2**30:8.2f} GiB evaluation")
    print(f"{len(rows)} rows")


def measure_apart(spec: JobSpec) -> dict[str, Any]:
    """What a process of its own measured, or {"error": ...} where it failed or took too long."""
    command = [sys.executable, __file__, "--row", json.dumps(spec.to_values())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ROW_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {ROW_SECONDS} s"}
    if done.returncode != 0:
        return {"error": (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1][:500]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def add_predictions(spec: JobSpec, row: dict[str, Any]) -> dict[str, Any]:
    """A measured row with what the closed form says: allocated bytes, and what a card must have to be said to fit."""
    predicted = predict(spec)
    gpu = detected_gpu(row["gpu"], row["gpu_bytes"])
    return {
        **row,
        "predicted_train_bytes": max(size for key, size in predicted.items() if "evaluation" not in key),
        "predicted_evaluation_bytes": max(size for key, size in predicted.items() if "evaluation" in key),
        "predicted_fits_bytes": cautious_bytes(spec, gpu, max(predicted.values())),
    }


def measure_all(only: str) -> dict[str, Any]:
    """The stored document with every row that it lacked; written after each."""
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    installed = [name for name in LIBRARIES if find_spec(name)]
    stored["versions"] = {name: version(name) for name in installed}
    for name, spec in list_rows().items():
        if only not in name or is_measured(stored["rows"].get(name, {"error": "not tried"})):
            continue
        reason = find_reason_to_skip(spec, installed)
        row = {"skipped": reason} if reason else measure_apart(spec)
        stored["rows"][name] = row = add_predictions(spec, row) if is_measured(row) else row
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
        seen = row.get("train_allocated_bytes")
        said = f"{row['predicted_train_bytes'] / seen - 1:+.2%}" if seen else row.get("skipped") or row["error"]
        print(f"{name:50} {said}", flush=True)
    return stored


def main() -> int:
    """Measure every row that is not there yet, then judge all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="list the rows with their predictions; needs no GPU")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(parse_spec(options.row, source="row"))))
        return 0
    if options.dry_run:
        list_predictions(options.only)
        return 0
    if not has_gpu():
        sys.exit("no GPU here: run it on a machine with one; --dry-run lists the rows")
    stored = measure_all(options.only)
    stored["summary"] = judge(stored["rows"])
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(stored["summary"], indent=1))
    return 0 if stored["summary"]["good"] else 1


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
