"""Fixtures of the training tests: a tiny model with its data, runs to train, and ranks to train them with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tiny_runs import HERE, RankServer, create_tiny_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lora_jobs.runs import Run


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankServer]:
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SUBMITIT_"))},
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": "cpu",
        "TRANSFORMERS_VERBOSITY": "error",
        "TORCH_EXTENSIONS_DIR": str(tmp_path_factory.mktemp("extensions")),
    }
    log = (tmp_path_factory.mktemp("ranks") / "server.log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(HERE / "rank_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    assert "ready" in first, Path(log.name).read_text()
    yield RankServer(process)
    assert process.stdin is not None
    process.stdin.close()
    process.wait(timeout=30)
    process.stdout.close()
    log.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with models/tiny_gemma2 and data/tiny, made by the demo's own command."""
    root = tmp_path_factory.mktemp("tiny")
    command = [sys.executable, "-m", "lora_jobs.training.demo", "tiny", "--models", "models", "--data", "data"]
    subprocess.run(command, cwd=root, check=True, timeout=120, capture_output=True)
    return root


@pytest.fixture
def make_run(tmp_path: Path, tiny: Path) -> Callable[..., Run]:
    """Creates runs of this test: make_run("name-1", training={...}, deepspeed={...})."""

    def make(run_id: str, **sections: dict[str, Any] | None) -> Run:
        return create_tiny_run(tmp_path, run_id, tiny, **sections)

    return make
