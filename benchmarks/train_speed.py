"""Speed and peak memory of our training loop beside the scripts that a user would write.

    python benchmarks/train_speed.py [--pairs 3] [--steps 16] [--model small]

Without a GPU: a small Llama with SmolLM2's vocabulary beside a plain Trainer + PEFT script, on rows that are most of
them completion and on rows that are most of them prompt, as a drawing with its caption is. With a GPU: Gemma 3 1B and
Llama 3.2 3B in bf16, beside TRL's own SFT script, too, with the share of the GPU's peak that the model's FLOPs reach.
Random weights; the same rows, tokens, batches, precision and machine. Each run is a process of its own, and the order
alternates. Writes benchmarks/results/train_speed_DEVICE.json.
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
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

RESULTS = Path(__file__).parent / "results"
WARM_UP_STEPS = 3
SHAPE = {
    "vocab_size": 49152, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6,
    "num_attention_heads": 6, "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 1024,
}  # fmt: skip
BATCH = 4


@dataclass(frozen=True, slots=True)
class Case:
    """One model: by the name of its shape (None: SHAPE), and how often a row says its drawing and its caption."""

    shape: str | None
    drawings: int
    captions: int

    @property
    def device(self) -> str:
        return "cpu" if self.shape is None else "cuda"


CASES = {
    "small": Case(None, 1, 6),
    "small, long prompts": Case(None, 6, 1),
    "gemma-3-1b": Case("google/gemma-3-1b-it", 1, 48),
    "llama-3.2-3b": Case("meta-llama/Llama-3.2-3B", 1, 48),
}
SCRIPTS = {"cpu": ("plain", "transformers", "trl"), "cuda": ("plain", "sft", "transformers", "trl")}
"""plain and sft are a user's scripts; transformers and trl are ours, by training.trainer."""

VERSIONS = ("torch", "transformers", "peft", "trl", "accelerate")


def make_inputs(root: Path, case: Case) -> None:
    """A random model with a tokenizer, and rows of about 100 or 1,000 tokens."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from lora_jobs.training.tiny import build_rows, build_tokenizer, write_rows
    from lora_jobs.training.trace.build import load_config

    rows = [
        {"prompt": row["svg"] * case.drawings, "completion": " " + f"{row['caption']} " * case.captions}
        for row in build_rows()
    ]
    build_tokenizer(row["prompt"] for row in rows).save_pretrained(root / "model")
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE) if case.shape is None else load_config(case.shape)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(root / "model")
    write_rows(root / "train.jsonl", rows)


def build_values(root: Path, steps: int, trainer: str) -> dict[str, Any]:
    import torch

    cuda = torch.cuda.is_available()
    return {
        "name": "speed",
        "model": {"name_or_path": str(root / "model"), "dtype": "bfloat16" if cuda else "float32"},
        "lora": {"r": 16},
        "data": {"train": str(root / "train.jsonl"), "max_length": 4096},
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


def load_base(root: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return AutoModelForCausalLM.from_pretrained(root / "model", dtype=dtype)


def build_options(directory: Path, steps: int) -> dict[str, Any]:
    """What both scripts say, by TrainingArguments' names."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "output_dir": str(directory), "per_device_train_batch_size": BATCH, "max_steps": steps, "learning_rate": 2e-4,
        "bf16": cuda, "use_cpu": not cuda, "lr_scheduler_type": "cosine", "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "optim": "adamw_torch", "disable_tqdm": True, "seed": 42,
        "activation_checkpointing": False,
    }  # fmt: skip


def build_clock(times: list[float]) -> Any:
    """A callback that writes down when each step was logged."""
    import time

    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc] # transformers has no types
        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            times.append(time.time()) if "loss" in logs else None

    return Clock()


def build_lora() -> Any:
    from peft import LoraConfig

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=16, target_modules=targets)


def run_plain(root: Path, directory: Path, steps: int) -> None:
    """What the guides of transformers and PEFT show: Trainer, get_peft_model, the stock loss."""
    from peft import get_peft_model
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

    from lora_jobs.spec import parse_spec
    from lora_jobs.training.data import load_examples

    set_seed(42)
    data = parse_spec(json.dumps(build_values(root, steps, "transformers")), source="speed").data
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    times: list[float] = []
    trainer = Trainer(
        model=get_peft_model(load_base(root), build_lora()),
        args=TrainingArguments(**build_options(directory, steps)),
        train_dataset=load_examples(data.train, data, tokenizer).dataset,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[build_clock(times)],
    )
    trainer.train()
    finish(times, [row["loss"] for row in trainer.state.log_history if "loss" in row][-1])


def run_sft(root: Path, directory: Path, steps: int) -> None:
    """What TRL's guide shows: SFTTrainer on rows of prompt and completion, with a LoraConfig."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, set_seed
    from trl import SFTConfig, SFTTrainer

    set_seed(42)
    times: list[float] = []
    trainer = SFTTrainer(
        model=load_base(root),
        args=SFTConfig(**build_options(directory, steps), max_length=4096),
        train_dataset=load_dataset("json", data_files=str(root / "train.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(root / "model"),
        peft_config=build_lora(),
        callbacks=[build_clock(times)],
    )
    trainer.train()
    finish(times, [row["loss"] for row in trainer.state.log_history if "loss" in row][-1])


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


def compare(root: Path, kinds: Sequence[str], pairs: int, steps: int) -> dict[str, Any]:
    """Every kind in turn, `pairs` times; medians, and ratios to the plain script (above 1: ours is better)."""
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for number in range(pairs):
        for kind in kinds if number % 2 == 0 else reversed(kinds):
            found[kind].append(measure(root, kind, steps))
            print(kind, found[kind][-1], flush=True)
    rows = {kind: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for kind, runs in found.items()}
    plain = rows["plain"]
    for row in rows.values():
        row["speed_ratio"] = round(plain["step_seconds"] / row["step_seconds"], 3)
        row["memory_ratio"] = round(plain["peak_bytes"] / row["peak_bytes"], 3)
    return rows


def add_speeds(rows: dict[str, Any], root: Path, case: Case, device: str) -> None:
    """Tokens per second; on a GPU that the table knows also the model FLOPs utilisation, recomputation not counted."""
    from transformers import AutoTokenizer

    from lora_jobs.sizing import find_shape
    from lora_jobs.sizing.duration import SPEEDS, TERA, step_flops
    from lora_jobs.spec import parse_spec
    from lora_jobs.training.data import load_examples

    spec = parse_spec(json.dumps(build_values(root, 1, "transformers")), source="speed")
    lengths = load_examples(spec.data.train, spec.data, AutoTokenizer.from_pretrained(root / "model")).dataset
    tokens = statistics.fmean(len(row["input_ids"]) for row in lengths)
    peak = next((speed.half * TERA for name, speed in SPEEDS.items() if name.split("-")[0] in device), None)
    for row in rows.values():
        row["tokens_per_second"] = round(BATCH * tokens / row["step_seconds"], 1)
        if case.shape is not None and peak is not None:
            flops = step_flops(spec, find_shape(case.shape), tokens)
            row["model_flops_utilisation"] = round(row["tokens_per_second"] * flops / peak, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--model", choices=list(CASES), help="left out: the small ones without a GPU, else the others")
    parser.add_argument("--child", choices=("plain", "sft", "transformers", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child in ("plain", "sft"):
        {"plain": run_plain, "sft": run_sft}[options.child](options.root, options.directory, options.steps)
        return
    if options.child:
        run_ours(options.root, options.directory, options.steps, options.child)
        return
    import torch

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.cuda.get_device_name() if kind == "cuda" else "cpu"
    models = [options.model] if options.model else [name for name, case in CASES.items() if case.device == kind]
    result = {
        "device": device,
        "processors": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONS},
        "batch": BATCH,
        "pairs": options.pairs,
        "steps": options.steps,
        "models": {},
    }
    for name in models:
        with tempfile.TemporaryDirectory() as directory:
            root = Path(directory)
            make_inputs(root, CASES[name])
            rows = compare(root, SCRIPTS[kind], options.pairs, options.steps)
            add_speeds(rows, root, CASES[name], device)
        result["models"][name] = rows
        path = RESULTS / f"train_speed_{device.replace(' ', '_')}.json"
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(name, json.dumps(rows, indent=2), flush=True)


if __name__ == "__main__":
    main()
