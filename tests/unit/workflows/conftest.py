"""A cluster of programs that answer what was recorded; each says in its first line that it is a fake."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lora_jobs.cluster.inventory import PROGRAMS

if TYPE_CHECKING:
    from collections.abc import Callable

RECORDED = Path(__file__).parents[2] / "slurm_output" / "22.05"


class FakeCluster:
    """Programs in one directory, which is all of PATH; `calls` holds how they were called."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()

    def answer(self, name: str, *cases: tuple[str, str], status: int = 0, stderr: bool = False) -> None:
        """`name` prints the text of the first case whose words stand in its arguments; each "" matches all."""
        lines = [
            "#!/bin/sh",
            "# A fake of a Slurm program, for tests.",
            f'echo "{name} $*" >> {self.directory}/calls',
            'case "$*" in',
        ]
        for number, (words, text) in enumerate(cases):
            file = self.directory / f"{name}.{number}.txt"
            file.write_text(text if text.endswith("\n") or not text else f"{text}\n")
            stream = " >&2" if stderr else ""
            pattern = f'*"{words}"*' if words else "*"
            lines.append(f'{pattern}) while IFS= read -r line; do echo "$line"{stream}; done < {file};;')
        program = self.directory / name
        program.write_text("\n".join([*lines, "esac", f"exit {status}"]) + "\n")
        program.chmod(0o755)

    def answer_as_recorded(self, **changed: str) -> None:
        """The tests' real cluster, with some answers (or the config) changed: name of a recorded file -> text."""

        def text(name: str) -> str:
            return changed.get(name, (RECORDED / f"{name}.txt").read_text())

        self.answer("sinfo", ("--version", text("sinfo_version")), ("", text("sinfo")))
        self.answer("scontrol", ("show config", text("scontrol_config")), ("", text("scontrol_partition")))
        self.answer("sacctmgr", ("show qos", text("sacctmgr_qos")), ("", text("sacctmgr_assoc")))
        for name in PROGRAMS:
            if not (self.directory / name).exists():
                self.answer(name, ("", ""))

    def calls(self) -> list[str]:
        path = self.directory / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    """An empty PATH, an empty working directory, a runs directory of its own."""
    found = FakeCluster(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(found.directory))
    monkeypatch.setenv("LORA_JOBS_HOME", str(tmp_path / "runs"))
    for name in ("LORA_JOBS_ENVS", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return found


SPEC = """
name: t
model: {name_or_path: google/gemma-2-2b, dtype: bfloat16}
lora: {r: 8}
data: {train: train.jsonl, format: text, max_length: 512}
training: {max_steps: 100, bf16: true, per_device_train_batch_size: 2, gradient_accumulation_steps: 4}
resources: {cluster: here, account: a, gpus_per_node: 2, cpus_per_task: 8, mem: 60G, time: "12:00:00"}
"""
ENVIRONMENT = """
scheduler: slurm
account_required: true
default_partition: big
partitions:
  big: {gpu: A100-64, gpus_per_node: 4, cpus_per_node: 32, mem_per_node: 100G, max_time: "24:00:00", max_nodes: 2,
        qos: {quick: {max_time: "00:30:00", max_nodes: 1}}}
  small: {gpu: T4, gpus_per_node: 2, max_time: "02:00:00", max_nodes: 1}
  serial: {max_time: "04:00:00"}
"""


@pytest.fixture
def make_spec(cluster: FakeCluster) -> Callable[..., Path]:
    """Writes a spec, its data and its environment file into the working directory."""

    def make(*changes: tuple[str, str], environment: str = ENVIRONMENT) -> Path:
        text = SPEC
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        Path("job.yaml").write_text(text)
        Path("train.jsonl").write_text(f'{{"text": "{"a" * 700}"}}\n' * 20)
        Path("envs").mkdir(exist_ok=True)
        Path("envs/here.yaml").write_text(environment)
        return Path("job.yaml")

    return make
