"""Runs on this machine: which of their processes live, stopping them, and what device there is."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from lora_jobs.cluster.commands import find_command, run_command
from lora_jobs.errors import ClusterError, CommandError
from lora_jobs.units import MIB

if TYPE_CHECKING:
    import psutil

    from lora_jobs.runs import Run, Submission

LAUNCHER = "lora_jobs.cluster.launch"
RANK = "submitit.core._submit"
QUERY_SECONDS = 30.0
SAME_START_SECONDS = 0.5


def find_local_processes(run: Run) -> list[int]:
    """Pids of every live process of the run on this machine, launcher first.

    A process belongs to the run when its command line has our module and the run's submitit folder as whole words,
    so a reused pid can't be mistaken for it. On a cluster's node these are the ranks that srun started.
    """
    return [process.pid for process in [*_find_processes(run, LAUNCHER), *_find_processes(run, RANK)]]


def find_live_folders() -> frozenset[str]:
    """Every word of the command lines of all runs' live processes on this machine, their submitit folders among them.

    One look at the process list answers for all runs: `str(run.submitit.absolute()) in find_live_folders()`.
    """
    import psutil

    words: set[str] = set()
    for process in psutil.process_iter(["cmdline"]):
        found = process.info["cmdline"] or []
        if (LAUNCHER in found or RANK in found) and process.is_running():
            words.update(found)
    return frozenset(words)


def is_launcher_alive(submission: Submission) -> bool:
    """True while the launcher of a local run lives: by pid and start time, since its command line may not show yet."""
    if submission.pid_created_at is None or not submission.job_id.isdecimal():
        return False
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(int(submission.job_id))
        same = abs(process.create_time() - submission.pid_created_at) < SAME_START_SECONDS
        return same and process.status() != psutil.STATUS_ZOMBIE
    return False


def is_running(run: Run) -> bool:
    """True while any process of the run lives on this machine."""
    return bool(find_local_processes(run))


def cancel_local(run: Run, *, force: bool = False) -> list[int]:
    """Ask the ranks of a local run to save and stop (SIGTERM), or kill them; returns the pids that were told.

    Only ranks are told, not their data loaders and not the launcher, which ends with them. `force` kills them all.
    """
    import psutil

    ranks = _find_processes(run, RANK)
    mine = {process.pid for process in ranks}
    told = []
    for process in [*_find_processes(run, LAUNCHER), *ranks] if force else ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            if not force and process.ppid() in mine:
                continue
            process.kill() if force else process.terminate()
            told.append(process.pid)
    if not told and not force:
        # Too early: the launcher has not started its ranks. It passes the signal on once it has.
        for process in _find_processes(run, LAUNCHER):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
                told.append(process.pid)
    return told


def detect_device(prefer: str | None = None) -> tuple[str, int]:
    """Name and memory in bytes of this machine's first GPU; ("cpu", all of its memory) where there is none.

    `prefer="cpu"` does not look for a GPU.
    """
    import psutil

    if prefer != "cpu" and find_command("nvidia-smi") is not None:
        argv = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        with contextlib.suppress(CommandError):
            answer = run_command(argv, timeout=QUERY_SECONDS)
            if answer.returncode == 0:
                return parse_nvidia_smi(answer.stdout)
    return "cpu", int(psutil.virtual_memory().total)


def parse_nvidia_smi(text: str) -> tuple[str, int]:
    """Name and memory in bytes of the first GPU of "NVIDIA A100-SXM-64GB, 65536" (MiB). Errors: ClusterError."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    name, _, memory = first.rpartition(",")
    if not name or not memory.strip().isdecimal():
        raise ClusterError(f"nvidia-smi answered {first[:200]!r}, wanted a name and a memory size in MiB")
    return name.strip(), int(memory) * MIB


def _find_processes(run: Run, module: str) -> list[psutil.Process]:
    import psutil

    folder = str(run.submitit.absolute())
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if module in words and folder in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return sorted(found, key=lambda process: process.pid)
