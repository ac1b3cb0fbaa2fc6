"""A spec, an environment and fake executables for the tests of rendering."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from lora_jobs.rendering import render_script
from lora_jobs.spec import ClusterEnvironment, JobSpec, parse_environment, parse_spec

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable

SPEC = """
name: tiny
model: {name_or_path: org/tiny-model}
lora: {r: 8}
data: {train: train.jsonl}
training: {max_steps: 3}
resources: {cluster: somewhere, time: "00:30:00"}
"""
ENVIRONMENT = {
    "scheduler": "slurm",
    "default_partition": "main",
    "partitions": {"main": {"gpu": "A100-64"}},
}

FAKE_PYTHON = """#!/bin/bash
# A fake, for tests: stands for the job's Python and answers like lora_jobs.training.attempt.
echo "this is a fake python" >&2
printf 'python' >> "$FAKE_CALLS"; printf ' [%s]' "$@" >> "$FAKE_CALLS"; echo >> "$FAKE_CALLS"
case " $* " in
*" begin "*)
    echo "a banner of the site"
    echo "$FAKE_ATTEMPT"
    exit "$FAKE_BEGIN_CODE" ;;
*" end "*)
    [[ $(grep -cF " [end] " "$FAKE_CALLS") -gt ${FAKE_END_FAILS:-0} ]] || exit 5
    case ${FAKE_END:-${!#}} in requeue*) echo "$FAKE_END" ;; 0) echo done ;; 85) echo requeue ;; *) echo stop ;; esac ;;
esac
"""
FAKE_SRUN = """#!/bin/bash
# A fake, for tests: stands for Slurm's srun. Runs nothing; ends with the code it was told, when $FAKE_GO is there.
echo "this is a fake srun" >&2
printf 'srun' >> "$FAKE_CALLS"; printf ' [%s]' "$@" >> "$FAKE_CALLS"; echo >> "$FAKE_CALLS"
env > "$FAKE_CALLS.env"
trap 'echo "srun got USR2" >> "$FAKE_CALLS"' USR2
touch "$FAKE_CALLS.started"
for _ in $(seq 400); do [[ -e $FAKE_GO ]] && break; sleep 0.02; done
exit "$FAKE_SRUN_CODE"
"""
FAKE_SLEEP = """#!/bin/bash
# A fake, for tests: does not sleep for seconds, and says that it was asked to.
[[ $1 == 0.* ]] && exec /bin/sleep "$1"
echo "sleep [$1]" >> "$FAKE_CALLS"
"""
FAKE_SCONTROL = """#!/bin/bash
# A fake, for tests: stands for Slurm's scontrol; knows one job. Its first $FAKE_AWAY answers about it after srun fail.
printf 'scontrol' >> "$FAKE_CALLS"; printf ' [%s]' "$@" >> "$FAKE_CALLS"; echo >> "$FAKE_CALLS"
asked=$(sed -n '/^srun/,$p' "$FAKE_CALLS" | grep -c '^scontrol')
if [[ $asked -gt 0 && $asked -le ${FAKE_AWAY:-0} ]]; then
    echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2
    exit 1
fi
case "$1 $2" in
"show hostnames") printf 'node1\\nnode2\\n' ;;
"show job") echo "JobId=7 JobName=tiny-1 UserId=me(1) JobState=$FAKE_STATE Reason=None Requeue=${FAKE_REQUEUE:-1}" \
    "EndTime=${FAKE_END_TIME:-2025-11-20T23:32:10} Deadline=N/A" ;;
esac
"""


@dataclass(frozen=True)
class Ended:
    """What bash and the fakes left behind: the exit code, the shell's log, the calls in order."""

    code: int
    log: str
    calls: list[str]
    srun_environment: dict[str, str]


class FakeCluster:
    """A directory with fake python, srun and scontrol, and a run directory beside it."""

    def __init__(self, root: Path, run: str = "run", python: str = "the python") -> None:
        self.root = root
        self.binaries = root / "bin"
        self.calls = root / "calls"
        self.scratch = root / "scratch"
        self.submitted_from = root / "cwd"
        self.run = root / run
        for folder in (self.binaries, self.scratch, self.submitted_from, self.run / "logs"):
            folder.mkdir(parents=True)
        self.python = str(self.binaries / python)
        for name, text in (
            (python, FAKE_PYTHON),
            ("srun", FAKE_SRUN),
            ("scontrol", FAKE_SCONTROL),
            ("sleep", FAKE_SLEEP),
        ):
            path = self.binaries / name
            path.write_text(text)
            path.chmod(0o755)

    def start(self, script: str, **settings: str) -> subprocess.Popen[str]:
        """bash on the script, as slurmd would start it: its own text in a spool file, another working directory."""
        spooled = self.root / "slurm_script"
        spooled.write_text(script)
        environment = {
            "PATH": f"{self.binaries}:/usr/bin:/bin",
            "HOME": str(self.root),
            "TMPDIR": str(self.scratch),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "FAKE_CALLS": str(self.calls),
            "FAKE_ATTEMPT": "1",
            "FAKE_BEGIN_CODE": "0",
            "FAKE_SRUN_CODE": "0",
            "FAKE_STATE": "RUNNING",
            "FAKE_GO": str(spooled),
            **settings,
        }
        return subprocess.Popen(
            ["/bin/bash", str(spooled)],
            env=environment,
            cwd=self.submitted_from,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, process: subprocess.Popen[str]) -> Ended:
        log, _ = process.communicate(timeout=90)
        calls = self.calls.read_text().splitlines() if self.calls.exists() else []
        exported = Path(f"{self.calls}.env")
        lines = exported.read_text().splitlines() if exported.exists() else []
        pairs = [line.split("=", maxsplit=1) for line in lines if "=" in line]
        return Ended(process.returncode, log, calls, dict(pairs))

    def execute(self, script: str, **settings: str) -> Ended:
        return self.finish(self.start(script, **settings))

    def execute_with_signals(self, script: str, numbers: list[signal.Signals], **settings: str) -> Ended:
        """Send the signals to the batch shell alone while srun runs; srun ends afterwards."""
        go = self.root / "go"
        process = self.start(script, FAKE_GO=str(go), **settings)
        started = Path(f"{self.calls}.started")
        deadline = time.monotonic() + 60
        while not started.exists():
            assert time.monotonic() < deadline, "srun was not started"
            time.sleep(0.01)
        for number in numbers:
            os.kill(process.pid, number)
            time.sleep(0.05)
            assert process.poll() is None, "the batch shell did not outlive the signal"
        go.touch()
        return self.finish(process)


@pytest.fixture
def fake_cluster(tmp_path: Path) -> FakeCluster:
    return FakeCluster(tmp_path / "machine" / "node")


@pytest.fixture
def build_fake_cluster(tmp_path: Path) -> Callable[..., FakeCluster]:
    """A fake cluster whose run directory and Python have names of the test's choice."""
    return lambda **names: FakeCluster(tmp_path / "machine" / "node", **names)


@pytest.fixture
def build_spec() -> Callable[..., JobSpec]:
    return lambda *overrides: parse_spec(SPEC, source="tiny.yaml", overrides=overrides)


@pytest.fixture
def build_environment() -> Callable[..., ClusterEnvironment]:
    return lambda **changes: parse_environment(
        yaml.safe_dump({**ENVIRONMENT, **changes}), name="somewhere", file="envs/somewhere.yaml"
    )


@pytest.fixture
def render(
    build_spec: Callable[..., JobSpec], build_environment: Callable[..., ClusterEnvironment]
) -> Callable[..., str]:
    """The script of the tiny spec, with changes."""

    def render_tiny(
        *overrides: str, run: Path = Path("/runs/tiny-1"), python: str = "/venv/bin/python", **changes: object
    ) -> str:
        return render_script(
            build_spec(*overrides), build_environment(**changes), run_id="tiny-1", run_directory=run, python=python
        )

    return render_tiny
