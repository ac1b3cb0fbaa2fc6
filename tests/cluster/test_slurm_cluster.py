"""The test cluster itself: started and stopped by hand without a trace, and skipped with a reason where it can't be."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from slurm_cluster import HOSTS, SEARCH_PATH, SlurmCluster, find_missing

SCRIPT = Path(__file__).with_name("slurm_cluster.py")


def list_commands() -> dict[int, str]:
    """Command line of every live process, by pid."""
    return {process.pid: " ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])}


@pytest.mark.slurm
def test_up_and_down_leave_nothing(tmp_path_factory: pytest.TempPathFactory):
    if (missing := find_missing()) is not None:
        pytest.skip(missing)
    root = tmp_path_factory.mktemp("s")
    before = HOSTS.read_text()
    up = subprocess.run([sys.executable, SCRIPT, "up", root], capture_output=True, text=True, check=True)
    try:
        assert up.stdout == f"export SLURM_CONF={root}/slurm.conf\n"
        pids = [int(pid) for pid, _ in SlurmCluster.load(root).processes.values()]
        assert len(pids) == 7
        environment = {"PATH": SEARCH_PATH, "SLURM_CONF": f"{root}/slurm.conf"}
        job = f"sleep 3{root.stat().st_ino}"
        script = f"#!/bin/bash\nsrun {job}\n"
        subprocess.run(["sbatch", f"--output={root}/out"], input=script, env=environment, text=True, check=True)
        deadline = time.monotonic() + 120
        while not any(line.endswith(f"/{job}") for line in list_commands().values()):
            assert time.monotonic() < deadline, "the job did not start"
            time.sleep(0.1)
    finally:
        subprocess.run([sys.executable, SCRIPT, "down", root], check=True)
    left = {p: line for p, line in list_commands().items() if line and (p in pids or str(root) in line or job in line)}
    assert left == {}, "daemons, step daemons and tasks are gone"
    assert HOSTS.read_text() == before


@pytest.mark.parametrize(("required", "status", "word"), [("0", 0, "1 skipped"), ("1", 1, "1 error")])
def test_without_slurm_the_tests_say_why(tmp_path: Path, required: str, status: int, word: str):
    command = [sys.executable, "-m", "pytest", "-q", "-rsE", "-p", "no:cacheprovider"]
    test = f"{Path(__file__).with_name('test_slurm_client.py')}::test_accepted_with_a_forecast"
    environment = {**os.environ, "PATH": str(tmp_path), "LORA_JOBS_REQUIRE_SLURM": required}
    done = subprocess.run([*command, test], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout
    assert word in done.stdout
    assert "not installed: " in done.stdout or "needs root" in done.stdout
    assert ("LORA_JOBS_REQUIRE_SLURM=1, but" in done.stdout) == (required == "1")
