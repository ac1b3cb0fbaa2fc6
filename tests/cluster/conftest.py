"""A real Slurm for the tests of this folder, started once for the session and left clean by every test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from slurm_cluster import SEARCH_PATH, SlurmCluster, find_missing

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def slurm_session() -> Iterator[SlurmCluster]:
    """The cluster. Where none can be started the tests are skipped; LORA_JOBS_REQUIRE_SLURM=1 makes that a failure."""
    if (missing := find_missing()) is not None:
        if os.environ.get("LORA_JOBS_REQUIRE_SLURM") == "1":
            pytest.fail(f"LORA_JOBS_REQUIRE_SLURM=1, but {missing}", pytrace=False)
        pytest.skip(missing)
    root = Path(tempfile.mkdtemp(prefix="lora-jobs-slurm-"))  # short: it holds sockets
    cluster = SlurmCluster(root)
    # Whoever kills the tests, or presses Ctrl-C twice, leaves no daemons behind.
    program = Path(__file__).with_name("slurm_cluster.py")
    down = [sys.executable, str(program), "down", str(root), "--after", str(os.getpid())]
    guard = subprocess.Popen(down, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(root, ignore_errors=True)
        guard.kill()
        guard.wait()


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with models/, data/tiny/ and the environment file of the cluster; nothing writes there."""
    directory = tmp_path_factory.mktemp("tiny")
    command = [sys.executable, "-m", "lora_jobs.training.demo", "tiny", "--models", "models", "--data", "data"]
    subprocess.run(command, cwd=directory, check=True, stdout=subprocess.DEVNULL)
    shutil.copy(Path(__file__).with_name("test_cluster.yaml"), directory)
    return directory


@pytest.fixture
def slurm(slurm_session: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    """The cluster with nothing in its queue; this process talks to it through SLURM_CONF."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", str(slurm_session.slurm_conf))
    monkeypatch.setenv("PATH", SEARCH_PATH)
    yield slurm_session
    slurm_session.call("scancel", "--user=root", check=False)
    deadline = time.monotonic() + 120
    while not slurm_session.is_idle():
        if time.monotonic() > deadline:
            pytest.fail(f"nodes still busy after the test:\n{slurm_session.call('squeue').stdout}")
        time.sleep(0.2)
