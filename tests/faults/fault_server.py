"""Forks ranks as tests/integration/rank_server.py does, with faults at chosen places, and stock trainings beside ours.

Requests: {"start": environment, "run": directory, "faults": [...]} is one of our ranks, {"start": environment,
"stock": fields of StockJob, "faults": [...]} one of a stock training. A fault is {"event", "step", "signal", "nth"}:
the rank sends itself this signal at the nth call of this callback event of Trainer in this step. With "fill" and
"leave" for "signal" it fills the file system of this file up to so many bytes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))

import rank_server
from stock_training import StockJob, train_stock

EVENTS = (
    "on_train_begin",
    "on_step_begin",
    "on_substep_end",
    "on_step_end",
    "on_evaluate",
    "on_prediction_step",
    "on_log",
    "on_save",
)


def fill_disk(path: Path, leave: int) -> None:
    """Write zeros until only `leave` bytes are free, as another job on the same disk might."""
    status = os.statvfs(path.parent)
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize - leave)


def add_faults(faults: list[dict[str, Any]]) -> None:
    """Have every Trainer of this process carry a callback that sends the signals; it comes before all others."""
    if not faults:
        return
    import transformers.trainer
    from transformers import TrainerCallback

    waiting = [dict(fault) for fault in faults]

    def fire(event: str, step: int) -> None:
        for fault in waiting:
            if fault["event"] != event or fault["step"] != step or fault["nth"] == 0:
                continue
            fault["nth"] -= 1
            if fault["nth"] == 0 and "fill" in fault:
                fill_disk(Path(fault["fill"]), fault["leave"])
            elif fault["nth"] == 0:
                os.kill(os.getpid(), signal.Signals[fault["signal"]])

    def listen(event: str) -> Any:
        return lambda _self, _args, state, _control, **_: fire(event, state.global_step)

    callback = type("Faults", (TrainerCallback,), {event: listen(event) for event in EVENTS})
    transformers.trainer.DEFAULT_CALLBACKS.append(callback)


def run_child(request: dict[str, Any]) -> None:
    """The forked child: never returns."""
    try:
        add_faults(request.get("faults", []))
        if "run" in request:
            rank_server.run_rank(request["run"], request["start"])
        run_stock(StockJob(**request["stock"]), request["start"])
    except BaseException:  # noqa: BLE001 - a child must never go back into the server's loop
        traceback.print_exc()
    finally:
        os._exit(70)


def run_stock(job: StockJob, environment: dict[str, str]) -> None:
    """One rank of a stock training, its output in rank-N.log; an exception is exit code 1."""
    os.setsid()
    os.environ.update(environment)
    Path(job.directory).mkdir(parents=True, exist_ok=True)
    log = os.open(
        Path(job.directory) / f"rank-{environment.get('RANK', '0')}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600
    )
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    code = 1
    try:
        train_stock(job)
        code = 0
    except BaseException:  # noqa: BLE001 - the exit code tells
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    if "poll" in request:
        return rank_server.answer(request)
    pid = rank_server.fork_rank() if "run" in request else os.fork()
    if pid == 0:
        run_child(request)
    return {"pid": pid}


def main() -> None:
    rank_server.import_stack()
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
