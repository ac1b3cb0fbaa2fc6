"""The #SBATCH lines as the real sbatch reads them: without a cluster it parses, says what it read, and gives up."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

CONFIGURATION = """
ClusterName=nowhere
SlurmctldHost=localhost
SlurmctldPort=1
MessageTimeout=1
NodeName=node1
PartitionName=main Nodes=ALL
"""

pytestmark = pytest.mark.skipif(shutil.which("sbatch") is None, reason="no sbatch on PATH")


@pytest.fixture
def read_options(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """The options that sbatch takes from a script."""

    def read(script: str) -> dict[str, str]:
        (tmp_path / "slurm.conf").write_text(CONFIGURATION)
        (tmp_path / "script").write_text(script)
        done = subprocess.run(
            ["sbatch", "-vv", str(tmp_path / "script")],
            env={"PATH": "/usr/bin:/bin", "SLURM_CONF": str(tmp_path / "slurm.conf")},
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        lines = done.stderr.split("defined options\n")[1].split("sbatch: end of defined options")[0].splitlines()
        pairs = [line.removeprefix("sbatch: ").split(":", maxsplit=1) for line in lines if ":" in line[8:]]
        return {name.strip(): value.strip() for name, value in pairs}

    return read


@pytest.mark.parametrize(
    "folder", ["/runs/tiny-1", "/my runs/it's #1", "/runs/100%/x", "/runs/$(id)`id`;|&<>*?[]{}!~", "/läufe/日本 語"]
)
def test_sbatch_reads_what_was_asked(folder: str, render, read_options) -> None:
    script = render(
        "resources={cluster: somewhere, account: mine, qos: fast, reservation: ours, time: 1-02:03:00}",
        'resources.constraint="a&(b|c)"',
        "resources.nodes=2",
        "resources.gpus_per_node=4",
        "resources.cpus_per_task=8",
        "resources.mem=5G",
        "resume.signal_seconds=90",
        run=Path(folder),
    )
    found = read_options(script)
    assert found == {
        "account": "mine",
        "constraint": "a&(b|c)",
        "cpus-per-task": "8",
        "gpus-per-node": "4",
        "job-name": "tiny-1",
        "mem": "5G",
        "nodes": "2",
        "ntasks-per-node": "4",
        "open-mode": "a",
        "output": f"{folder.replace('%', '%%')}/logs/slurm-%j.out",
        "partition": "main",
        "qos": "fast",
        "requeue": "requeue",
        "reservation": "ours",
        "signal": "USR2@90",
        "time": "1-02:03:00",
        "verbose": "2",
    }
