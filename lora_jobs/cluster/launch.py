"""`python -m lora_jobs.cluster.launch FOLDER`: starts the ranks of a local run, passes signals on, ends with them.

It stands where srun stands on a cluster, and keeps to the same rules: a signal to the job reaches every rank, a
warning comes before the time limit, and ranks don't wait for ever for one that failed.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from submitit.local.local import Controller

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

POLL_SECONDS = 0.1


class RankController(Controller):
    """submitit's controller: starts a task per rank and its log files; the waiting is our own."""

    # How long the others may go on after one rank failed: mostly they find out by themselves, and say it better.
    failed_rank_seconds = 30.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.asked_to_stop: int | None = None
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        self.asked_to_stop = number
        self._forward_signal(signal.Signals(number))

    def wait(self, freq: int = 24) -> Sequence[int | None]:  # noqa: ARG002
        """Exit codes of the ranks; None for one that is still alive at the time limit or after another failed."""
        started = time.monotonic()
        warned = False
        if self.asked_to_stop is not None:  # while the ranks were being started: some have missed it
            self._forward_signal(signal.Signals(self.asked_to_stop))
        failed_at: float | None = None
        while True:
            codes = [task.poll() for task in self.tasks]
            now = time.monotonic()
            if all(code is not None for code in codes) or now - started > self.timeout_s:
                return codes
            if failed_at is None and any(code for code in codes):
                failed_at = now
            if failed_at is not None and now - failed_at > self.failed_rank_seconds:
                return codes
            if not warned and now - started > self.timeout_s - self.signal_delay_s:
                self._forward_signal(signal.SIGUSR2)
                warned = True
            time.sleep(POLL_SECONDS)

    def run(self, max_retry: int = 1) -> None:  # noqa: ARG002
        """One start; what happens after a saved stop is decided by `resume`, not here."""
        if self.asked_to_stop is not None:
            return
        try:
            self.start_tasks()
            self.wait()
        finally:
            self.kill_tasks()


def main(arguments: Sequence[str]) -> None:
    """Run the job that submitit wrote into FOLDER; kernels compiled on the way go to a directory of this job."""
    with tempfile.TemporaryDirectory(prefix="lora-jobs-", ignore_cleanup_errors=True) as scratch:
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", f"{scratch}/torch_extensions")
        os.environ.setdefault("TRITON_CACHE_DIR", f"{scratch}/triton")
        RankController(Path(arguments[0])).run()


if __name__ == "__main__":
    main(sys.argv[1:])
