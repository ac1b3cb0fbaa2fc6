"""Ranks with faults in them, ours and stock, and what came of them in one word."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stock_training import SAVE_STEPS, STEPS, StockJob
from tiny_runs import Job, RankServer, create_tiny_run, hash_adapter, read_logs

from lora_jobs.runs import EXIT_NO_CHECKPOINT, Run, load_attempts, load_metrics

if TYPE_CHECKING:
    from collections.abc import Sequence

STUCK_SECONDS = 30.0
"""A rank that lives this long after another one has failed is waiting for it."""
LONGEST_SECONDS = 240.0

TRAINING: dict[str, Any] = {"trainer": "transformers", "max_steps": STEPS, "save_steps": SAVE_STEPS}
# Without held-out examples: an evaluation before and after each of some hundred trainings shows nothing here.
PLAIN: dict[str, Any] = {"training": TRAINING, "data": {"eval": None}}
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "plain": (PLAIN, 1),
    "zero2": ({**PLAIN, "deepspeed": {"zero_stage": 2}, "resources": {"gpus_per_node": 2}}, 2),
    "ddp": ({**PLAIN, "resources": {"gpus_per_node": 2}}, 2),
}


def fault(event: str, step: int, number: str = "SIGKILL", nth: int = 1) -> dict[str, Any]:
    """A signal to oneself at the nth call of this callback event in this step."""
    return {"event": event, "step": step, "signal": number, "nth": nth}


def start_stock(server: RankServer, job: StockJob, ranks: int, faults: Sequence[dict[str, Any]] = ()) -> Job:
    """Start the ranks of a stock training as torchrun's environment variables would have it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(ranks):
        environment = {}
        if ranks > 1:
            environment = {
                "RANK": f"{rank}",
                "LOCAL_RANK": f"{rank}",
                "WORLD_SIZE": f"{ranks}",
                "LOCAL_WORLD_SIZE": f"{ranks}",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": f"{port}",
            }
        pids.append(server.ask({"start": environment, "stock": asdict(job), "faults": list(faults)})["pid"])
    return Job(server, pids)


def wait_or_end(job: Job, *, patience: float = STUCK_SECONDS) -> tuple[list[int], bool]:
    """Exit codes in rank order, and whether ranks had to be killed because they went on waiting.

    After one has failed the others have `patience` seconds, as the launcher and `srun --wait` give them.
    """
    deadline = time.monotonic() + LONGEST_SECONDS
    stuck = None
    hung = False
    while len(job.codes) < len(job.pids):
        for pid in job.pids:
            if pid not in job.codes and (code := job.server.ask({"poll": pid})["code"]) is not None:
                job.codes[pid] = code
        if stuck is None and any(code != 0 for code in job.codes.values()):
            stuck = time.monotonic() + patience
        if not hung and time.monotonic() > min(deadline, stuck or deadline):
            hung = True
            for pid in job.pids:
                if pid not in job.codes:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return [job.codes[pid] for pid in job.pids], hung


def wait_until_stopped(pid: int) -> None:
    """Until SIGSTOP has stopped the process: a SIGCONT before that would be lost."""
    deadline = time.monotonic() + LONGEST_SECONDS
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline, f"process {pid} was not stopped"
        time.sleep(0.01)


@dataclass(frozen=True)
class Outcome:
    """What a resume did: a verdict in a few words, and the detail behind it."""

    verdict: str
    detail: str = ""


def resume_stock(
    server: RankServer, job: StockJob, ranks: int, *, reference: str, marker: Path | None = None
) -> Outcome:
    """Resume a stock training from its directory and say what it did."""
    root = Path(job.directory)
    (root / "resumed_from").unlink(missing_ok=True)
    codes, hung = wait_or_end(start_stock(server, job, ranks))
    ran = "; ran the hidden code" if marker is not None and marker.exists() else ""
    if hung:
        return Outcome(f"hung{ran}", f"exit codes {codes}")
    if any(codes):
        return Outcome(f"crashed{ran}", find_error(root))
    resumed = (root / "resumed_from").read_text()
    verdict = "accepted, same result" if hash_file(root / "final") == reference else "trained on wrong state"
    return Outcome(f"{verdict}{ran}", f"resumed from {resumed or 'nothing'}")


def resume_ours(server: RankServer, run: Run, ranks: int, *, older: str, reference: str) -> Outcome:
    """Resume one of our runs and say what it did."""
    known = len(load_attempts(run))
    codes, hung = wait_or_end(server.start(run, ranks))
    attempt = load_attempts(run)[known]
    if hung:
        return Outcome("hung", read_logs(run)[-500:])
    if any(codes):
        trained = any(row["kind"] == "train" and row["attempt"] == attempt.number for row in load_metrics(run))
        refused = attempt.exit_code in (2, 5, EXIT_NO_CHECKPOINT) and not trained
        return Outcome("refused" if refused else "crashed", attempt.reason or f"exit codes {codes}")
    same = hash_adapter(run) == reference
    if attempt.resume_from == older:
        return Outcome("fell back" if same else "fell back, other result", f"resumed from {older}")
    detail = f"resumed from {attempt.resume_from or 'nothing'}"
    return Outcome("accepted, same result" if same else "trained on wrong state", detail)


def find_error(root: Path) -> str:
    """The last line of the first traceback in a stock training's logs."""
    for log in sorted(root.glob("rank-*.log")):
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        for line in lines:
            if line[:1].isalpha() and "Error" in line.split(":")[0]:
                return line[:160]
    return "no message"


def hash_file(directory: Path) -> str:
    """sha256 of an adapter's weights."""
    return hashlib.sha256((directory / "adapter_model.safetensors").read_bytes()).hexdigest()


@dataclass(frozen=True)
class Stopped:
    """Ours and stock, each killed after step 5 with the checkpoints 2 and 4; what each ends with uninterrupted."""

    kind: str
    ranks: int
    run: Run
    other: Run
    reference: str
    stock: StockJob
    stock_reference: str


def make_stopped(server: RankServer, kind: str, root: Path, tiny: Path, *, stock: bool = True) -> Stopped:
    """Train what the damaged copies are made from: whole, stopped, and another run's, ours and stock side by side."""
    root.mkdir()
    sections, ranks = KINDS[kind]
    kill = [fault("on_step_end", 5)]
    whole = create_tiny_run(root, f"{kind}_whole-1", tiny, **sections)
    codes, _ = wait_or_end(server.start(whole, ranks))
    assert codes == [0] * ranks, read_logs(whole)
    stopped = {}
    for name, seed in (("stopped", 42), ("other", 7)):
        changed = {**sections, "training": {**sections["training"], "seed": seed}}
        run = stopped[name] = create_tiny_run(root, f"{kind}_{name}-1", tiny, **changed)
        codes, _ = wait_or_end(server.start(run, ranks, dict.fromkeys(range(ranks), kill)))
        assert codes == [-9] * ranks, read_logs(run)
        assert sorted(path.name for path in run.checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    job = StockJob(str(root / f"{kind}_stock"), str(tiny), 2 if kind == "zero2" else None)
    reference = ""
    if stock:
        straight = replace(job, directory=str(root / f"{kind}_stock_whole"))
        codes, _ = wait_or_end(start_stock(server, straight, ranks))
        assert codes == [0] * ranks, find_error(Path(straight.directory))
        reference = hash_file(Path(straight.directory) / "final")
        codes, _ = wait_or_end(start_stock(server, job, ranks, kill))
        assert codes == [-9] * ranks, find_error(Path(job.directory))
    return Stopped(kind, ranks, stopped["stopped"], stopped["other"], hash_adapter(whole), job, reference)


def copy_run(run: Run, directory: Path) -> Run:
    """A copy of a run that may be damaged."""
    shutil.copytree(run.directory, directory, symlinks=True)
    return Run(directory)


def copy_stock(job: StockJob, directory: Path) -> StockJob:
    """A copy of a stock training's directory; its checkpoints' names in trainer_state.json stay as they are."""
    shutil.copytree(job.directory, directory, symlinks=True)
    return replace(job, directory=str(directory))


def load_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that the tests have recorded."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
