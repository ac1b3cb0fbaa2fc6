"""Tokens per second and peak memory of our training loop beside the Trainer + PEFT script that a user would write.

    python benchmarks/train_speed.py [--pairs 3] [--steps 16]

Same model (random weights, a Llama with SmolLM2's vocabulary), rows, tokens, batches, precision and machine. Each run
is a process of its own, and the order alternates. On a GPU both use bf16. Writes benchmarks/results/train_speed.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "train_speed.json"
WARM_UP_STEPS = 3
SHAPE = {
    "vocab_size": 49152, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6,
    "num_attention_heads": 6, "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 1024,
}  # fmt: skip
BATCH, LENGTH = 4, 160
VERSIONS = ("torch", "transformers", "peft", "trl", "accelerate")


def make_inputs(root: Path) -> None:
    """A random model with a tokenizer, and rows of about LENGTH tokens, half of them prompt."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from lora_jobs.training.tiny import build_rows, build_tokenizer, write_rows

    rows = [{"prompt": row["svg"], "completion": " " + f"{row['caption']} " * 6} for row in build_rows()]
    build_tokenizer(row["prompt"] for row in rows).save_pretrained(root / "model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).save_pretrained(root / "model")
    write_rows(root / "train.jsonl", rows)


def build_values(root: Path, steps: int, trainer: str) -> dict[str, Any]:
    import torch

    cuda = torch.cuda.is_available()
    return {
        "name": "speed",
        "model": {"name_or_path": str(root / "model"), "dtype": "bfloat16" if cuda else "float32"},
        "lora": {"r": 16},
        "data": {"train": str(root / "train.jsonl"), "max_length": LENGTH * 4},
        "training": {
            "trainer": trainer, "per_device_train_batch_size": BATCH, "max_steps": steps, "bf16": cuda,
            "activation_checkpointing": False, "optim": "adamw_torch", "save_steps": 10_000, "report_to": [],
        },
        "resources": {"cpus_per_task": os.cpu_count() or 1},
    }  # fmt: skip


def run_ours(root: Path, directory: Path, steps: int, trainer: str) -> None:
    """One run through the entry that every submitted process starts in."""
    from lora_jobs.runs import Run, create_run, load_metrics
    from lora_jobs.spec import parse_spec, render_spec
    from lora_jobs.training.entry import train

    spec = parse_spec(json.dumps(build_values(root, steps, trainer)), source="speed")
    run: Run = create_run(directory, "speed-1", {"spec.yaml": render_spec(spec)})
    os.environ.update(
        SUBMITIT_LOCAL_JOB_ID="speed", SUBMITIT_LOCAL_NTASKS="1", SUBMITIT_LOCAL_GLOBALID="0",
        SUBMITIT_LOCAL_LOCALID="0",
    )  # fmt: skip
    answer = os.dup(1)
    train(str(run.directory))
    rows = [row for row in load_metrics(run) if row["kind"] == "train"]
    os.dup2(answer, 1)
    finish([row["time"] for row in rows], rows[-1]["loss"])


def run_plain(root: Path, directory: Path, steps: int) -> None:
    """What the guides of transformers and PEFT show: Trainer, get_peft_model, the stock loss."""
    import time

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )

    from lora_jobs.spec import parse_spec
    from lora_jobs.training.data import load_examples

    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc] # transformers has no types
        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            times.append(time.time()) if "loss" in logs else None

    cuda = torch.cuda.is_available()
    torch.set_num_threads(os.cpu_count() or 1)
    set_seed(42)
    data = parse_spec(json.dumps(build_values(root, steps, "transformers")), source="speed").data
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    base = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.bfloat16 if cuda else torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=16, target_modules=targets))
    args = TrainingArguments(
        output_dir=str(directory), per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=2e-4, bf16=cuda,
        lr_scheduler_type="cosine", logging_steps=1, save_strategy="no", report_to="none", use_cpu=not cuda,
        optim="adamw_torch", disable_tqdm=True, seed=42,
    )  # fmt: skip
    examples = load_examples(data.train, data, tokenizer).dataset
    collator = DataCollatorForSeq2Seq(tokenizer)
    trainer = Trainer(model=model, args=args, train_dataset=examples, data_collator=collator, callbacks=[Clock()])
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    finish(times, losses[-1])


def finish(times: list[float], loss: float) -> None:
    """One line of JSON: seconds of a step (median after the warm-up), peak memory in bytes, the last loss."""
    import resource

    import torch

    seconds = [after - before for before, after in itertools.pairwise(times)][WARM_UP_STEPS - 1 :]
    cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    answer = {"step_seconds": statistics.median(seconds), "peak_bytes": peak, "last_loss": loss}
    print("ANSWER " + json.dumps(answer), flush=True)


def measure(root: Path, kind: str, steps: int) -> dict[str, float]:
    """One run in a process of its own."""
    with tempfile.TemporaryDirectory(dir=root) as directory:
        command = [sys.executable, "-W", "ignore", __file__, "--child", kind, "--root", str(root)]
        command += ["--directory", directory, "--steps", str(steps)]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    if not lines:
        raise SystemExit(f"{kind} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return dict(json.loads(lines[-1].removeprefix("ANSWER ")))


def compare(root: Path, pairs: int, steps: int) -> dict[str, Any]:
    """Every kind in turn, `pairs` times; medians, and ratios to the plain script (above 1: ours is better)."""
    found: dict[str, list[dict[str, float]]] = {"plain": [], "transformers": [], "trl": []}
    for number in range(pairs):
        for kind in list(found) if number % 2 == 0 else reversed(found):
            found[kind].append(measure(root, kind, steps))
            print(kind, found[kind][-1], flush=True)
    rows = {kind: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for kind, runs in found.items()}
    plain = rows["plain"]
    for row in rows.values():
        row["speed_ratio"] = round(plain["step_seconds"] / row["step_seconds"], 3)
        row["memory_ratio"] = round(plain["peak_bytes"] / row["peak_bytes"], 3)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--child", choices=("plain", "transformers", "trl"))
    parser.add_argument("--root", type=Path)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    if options.child == "plain":
        run_plain(options.root, options.directory, options.steps)
        return
    if options.child:
        run_ours(options.root, options.directory, options.steps, options.child)
        return
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        make_inputs(root)
        rows = compare(root, options.pairs, options.steps)
    import torch

    result = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processors": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONS},
        "shape": {**SHAPE, "batch": BATCH},
        "pairs": options.pairs,
        "steps": options.steps,
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
