"""What it costs that the ranks ask each other at every step whether to stop: one all-reduce of one number over gloo.

Prints microseconds a question for 2 and 4 ranks on this machine (through its loopback), and the share of a step of 1 s,
and writes them into benchmarks/results/agreement.json.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import statistics
import sys
import time
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

QUESTIONS = 2000
RESULTS = Path(__file__).resolve().parent / "results" / "agreement.json"


def ask(rank: int, ranks: int, port: int, answer: Connection) -> None:
    """One rank: joins, warms up, asks; rank 0 sends the seconds of each question."""
    os.environ.update(RANK=f"{rank}", WORLD_SIZE=f"{ranks}", MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
    import torch
    import torch.distributed as dist

    from lora_jobs.training.agreement import Agreement

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    agreement = Agreement(ranks)
    seconds = []
    for number in range(QUESTIONS + 100):
        began = time.perf_counter()
        agreement.any(False)
        if number >= 100:
            seconds.append(time.perf_counter() - began)
    dist.destroy_process_group()
    if rank == 0:
        answer.send(seconds)


def measure(ranks: int) -> list[float]:
    """Seconds of each question in rank 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    processes = [context.Process(target=ask, args=(rank, ranks, port, theirs)) for rank in range(ranks)]
    for process in processes:
        process.start()
    seconds: list[float] = mine.recv()
    for process in processes:
        process.join()
    return seconds


def main() -> int:
    print(f"one question whether a signal came, {QUESTIONS} times, {os.cpu_count()} cores")
    rows = []
    for ranks in (2, 4):
        seconds = sorted(measure(ranks))
        median, slow = statistics.median(seconds), seconds[int(0.99 * len(seconds))]
        rows.append({"ranks": ranks, "median_seconds": median, "seconds_of_99_percent": slow})
        share = f"{median:.4%} of a step of 1 s"
        print(f"{ranks} ranks: median {median * 1e6:.0f} us, 99 % below {slow * 1e6:.0f} us: {share}")
    machine = {"cores": os.cpu_count(), "processor": platform.machine(), "load": round(os.getloadavg()[0], 1)}
    found = {"questions": QUESTIONS, "rows": rows, "machine": machine, "torch": version("torch")}
    RESULTS.write_text(json.dumps({**found, "date": time.strftime("%Y-%m-%d")}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
