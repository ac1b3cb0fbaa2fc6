"""Tiny runs and the ranks that train them: what the training tests share."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_jobs.rendering.deepspeed import build_deepspeed_config
from lora_jobs.runs import Run, create_run, load_metrics
from lora_jobs.spec import JobSpec, parse_spec, render_spec

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

HERE = Path(__file__).parent
TIMEOUT_SECONDS = 240.0


@dataclass
class Job:
    """The ranks of one start of a run."""

    server: RankServer
    pids: list[int]
    codes: dict[int, int] = field(default_factory=dict)

    def wait(self) -> list[int]:
        """Exit codes in rank order, negative for a signal; fails when a rank is still there after TIMEOUT_SECONDS."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while len(self.codes) < len(self.pids):
            for pid in self.pids:
                if pid not in self.codes and (code := self.server.ask({"poll": pid})["code"]) is not None:
                    self.codes[pid] = code
            assert time.monotonic() < deadline, f"ranks {self.pids} did not end: {self.codes}"
            time.sleep(0.02)
        return [self.codes[pid] for pid in self.pids]

    def listens(self, rank: int) -> bool:
        """Whether the rank catches SIGTERM by now; until then it ignores it, as the shell of a job script does."""
        status = Path(f"/proc/{self.pids[rank]}/status").read_text(encoding="ascii")
        caught = int(status.split("SigCgt:")[1].split()[0], 16)
        return bool(caught >> (signal.SIGTERM - 1) & 1)

    def kill(self, number: signal.Signals, *, ranks: list[int] | None = None) -> None:
        for rank in range(len(self.pids)) if ranks is None else ranks:
            os.kill(self.pids[rank], number)


@dataclass
class RankServer:
    """The process that ranks are forked from."""

    process: subprocess.Popen[str]
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))

    def start_slurm_task(self, run: Run, job_id: str, **more: str) -> Job:
        """Start a run's only rank as srun does, in a job of one task; `more` is what the batch script exported."""
        environment = {"SLURM_JOB_ID": job_id, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1", **more}
        return Job(self, [self.ask({"start": environment, "run": str(run.directory)})["pid"]])

    def start(
        self, run: Run, ranks: int, faults: Mapping[int, Sequence[dict[str, Any]]] | None = None, **more: str
    ) -> Job:
        """Start a run's ranks as submitit's local executor does: by its environment variables, and `more` of them.

        `faults` by rank, for the server of the fault tests.
        """
        job_id = f"test{next(self.numbers)}"
        pids = []
        for rank in range(ranks):
            environment = {
                "SUBMITIT_LOCAL_JOB_ID": job_id,
                "SUBMITIT_LOCAL_NTASKS": f"{ranks}",
                "SUBMITIT_LOCAL_GLOBALID": f"{rank}",
                "SUBMITIT_LOCAL_LOCALID": f"{rank}",
                **more,
            }
            request: dict[str, Any] = {"start": environment, "run": str(run.directory)}
            if faults:
                request["faults"] = list(faults.get(rank, ()))
            pids.append(self.ask(request)["pid"])
        return Job(self, pids)


@contextmanager
def serve_ranks(script: Path, directory: Path) -> Iterator[RankServer]:
    """A server of forked ranks (`script` is rank_server.py or speaks like it); its log and builds in `directory`."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SUBMITIT_"))},
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": "cpu",
        "TRANSFORMERS_VERBOSITY": "error",
        "TORCH_EXTENSIONS_DIR": str(directory / "extensions"),
    }
    path = directory / "server.log"
    with path.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert "ready" in process.stdout.readline(), path.read_text()
        try:
            yield RankServer(process)
        finally:
            process.stdin.close()
            process.wait(timeout=30)
            process.stdout.close()


def make_tiny_files(root: Path) -> Path:
    """`root` with models/tiny_gemma2 and data/tiny, made by the demo's own command."""
    command = [sys.executable, "-m", "lora_jobs.training.demo", "tiny", "--models", "models", "--data", "data"]
    subprocess.run(command, cwd=root, check=True, timeout=120, capture_output=True)
    return root


def build_spec(tiny: Path, **sections: dict[str, Any] | None) -> JobSpec:
    """The spec of a tiny run; each keyword replaces keys of one section (None leaves the section out)."""
    values: dict[str, Any] = {
        "name": "tiny",
        "model": {"name_or_path": str(tiny / "models" / "tiny_gemma2"), "dtype": "float32"},
        "lora": {"r": 4, "lora_dropout": 0.1},
        "data": {
            "train": str(tiny / "data" / "tiny" / "train.jsonl"),
            "eval": str(tiny / "data" / "tiny" / "eval.jsonl"),
            "format": "svg_caption",
            "instruction": "Draw.",
            "max_length": 160,
        },
        "training": {
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 4,
            "learning_rate": 0.01,
            "max_steps": 16,
            "save_steps": 4,
            "activation_checkpointing": False,
            "optim": "adamw_torch",
        },
    }
    for name, changes in sections.items():
        values[name] = None if changes is None else {**values.get(name, {}), **changes}
    return parse_spec(json.dumps({key: value for key, value in values.items() if value is not None}), source="test")


def create_tiny_run(root: Path, run_id: str, tiny: Path, **sections: dict[str, Any] | None) -> Run:
    """A run directory with the files that `submit` writes and training reads."""
    spec = build_spec(tiny, **sections)
    files = {"spec.yaml": render_spec(spec)}
    if (config := build_deepspeed_config(spec)) is not None:
        files["deepspeed.json"] = json.dumps(config)
    return create_run(root / "runs", run_id, files)


def wait_for_step(run: Run, step: int, *, commits: int | None = None, row: str = "train") -> None:
    """Return once a row of this kind and step is there (and, when asked for, the checkpoint of step `commits`)."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while True:
        reached = any(each["kind"] == row and each["step"] >= step for each in load_metrics(run))
        if reached and (commits is None or (run.checkpoints / f"checkpoint-{commits}" / "MANIFEST.json").exists()):
            return
        assert time.monotonic() < deadline, read_logs(run)
        time.sleep(0.01)


def read_logs(run: Run) -> str:
    """Everything the ranks of a run have written."""
    return "".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(run.logs.glob("*")))


def hash_adapter(run: Run) -> str:
    """sha256 of the finished adapter's weights."""
    return hashlib.sha256((run.adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
