"""How long the commands before training take, beside what they are measured against, pair by pair in one run.

`make bench` prints the table and writes benchmarks/results/commands.json. Medians of whole processes and of calls; the
ratio is the median of the pairs' ratios, so a machine that drifts does not bend it.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from lora_jobs.checkpoints import commit_checkpoint, verify_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results" / "commands.json"
PAIRS = 7
CHECKPOINT_BYTES = 512 * 1024**2


@dataclass(frozen=True, slots=True)
class Row:
    """Two things measured in turn: medians in seconds, and the median of the pairs' ratios."""

    what: str
    seconds: float
    against: str
    against_seconds: float
    ratio: float


def time_call(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure_pairs(what: str, call: Callable[[], object], against: str, other: Callable[[], object]) -> Row:
    """Both once to warm up, then `PAIRS` times in turn."""
    call(), other()
    pairs = [(time_call(call), time_call(other)) for _ in range(PAIRS)]
    ours, theirs = zip(*pairs, strict=True)
    ratio = statistics.median(a / b for a, b in pairs)
    return Row(what, statistics.median(ours), against, statistics.median(theirs), ratio)


def run_python(*arguments: str) -> Callable[[], object]:
    """Our modules are byte-compiled in the first call, the warm-up, as those of an installed package are."""
    environment = {**os.environ, "LORA_JOBS_HOME": tempfile.gettempdir() + "/lora-jobs-bench-none"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return lambda: subprocess.run(
        [sys.executable, *arguments], check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )


def measure_commands() -> list[Row]:
    """The commands of the login node against `import torch` alone, which they do without."""
    torch = ("import torch", run_python("-c", "import torch"))
    job = "jobs/gemma2_9b_svg.yaml"
    return [
        measure_pairs(f"lora-jobs {command[0]}", run_python("-m", "lora_jobs", *command), *torch)
        for command in (["check", job], ["render", job], ["status"])
    ]


# `accelerate estimate-memory` first asks the hub about the model, whatever it is given; this is what it does then.
ACCELERATE = """
import sys
import torch
from accelerate import init_empty_weights
from accelerate.commands.estimate import estimate_training_usage
from accelerate.utils import calculate_maximum_sizes
from transformers import AutoConfig, AutoModel
with init_empty_weights():
    model = AutoModel.from_config(AutoConfig.from_pretrained(sys.argv[1]), dtype=torch.float32)
print(estimate_training_usage(calculate_maximum_sizes(model)[0], "bfloat16"))
"""


def measure_estimators(directory: Path) -> list[Row]:
    """`check` against accelerate's estimator on the same model, without the latter's question to the hub."""
    config = "import sys, transformers; transformers.Gemma2Config().save_pretrained(sys.argv[1])"
    run_python("-c", config, str(directory))()
    check = run_python("-m", "lora_jobs", "check", "jobs/gemma2_9b_svg.yaml")
    other = run_python("-c", ACCELERATE, str(directory))
    return [measure_pairs("lora-jobs check", check, "accelerate estimate-memory, no hub", other)]


def measure_checkpoints(directory: Path) -> list[Row]:
    """Committing and verifying one checkpoint against reading its files once."""
    data = os.urandom(CHECKPOINT_BYTES // 4)
    for number in range(4):
        (directory / f"shard_{number}.data").write_bytes(data)

    def read() -> None:
        for path in directory.glob("*.data"):
            path.read_bytes()

    def commit() -> None:
        commit_checkpoint(directory, step=1, world_size=1, metadata={})

    size = f"{CHECKPOINT_BYTES // 1024**2} MiB"
    committed = measure_pairs(f"commit {size}: fsync, hash, manifest", commit, "reading it once", read)
    verified = measure_pairs(f"verify {size}, level 2", lambda: verify_checkpoint(directory), "reading it once", read)
    return [committed, verified]


def main() -> None:
    rows = measure_commands()
    with tempfile.TemporaryDirectory(dir=ROOT) as directory:
        (config := Path(directory) / "gemma2").mkdir()
        rows += measure_estimators(config)
        (checkpoint := Path(directory) / "adapter").mkdir()
        rows += measure_checkpoints(checkpoint)
    for row in rows:
        sides = f"{row.what:40} {row.seconds:7.3f} s   {row.against:34} {row.against_seconds:7.3f} s"
        print(f"{sides}   ratio {row.ratio:5.2f}")
    versions = {name: version(name) for name in ("lora-jobs", "torch", "pydantic", "typer", "rich")}
    machine = {"python": platform.python_version(), "cpus": os.cpu_count(), "system": platform.platform()}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps({"rows": [asdict(row) for row in rows], "versions": versions, "machine": machine}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
