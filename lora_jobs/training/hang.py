"""A rank that waits for ever is ended: its stacks go into the log, and the job comes back on its own."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from typing import TYPE_CHECKING

from lora_jobs.runs import EXIT_HANG

if TYPE_CHECKING:
    from collections.abc import Callable

TICK_SECONDS = 1.0
# A model that is read from a slow disk, or a dataset that is tokenized, gives no sign for long.
SET_UP_SECONDS = 3600.0
# How many times the longest silence so far the next one may last.
PATIENCE = 10.0


class HangWatch:
    """A thread that looks whether its rank still gets on; `beat` says that it does.

    Within the training the bound is PATIENCE times the longest time between two beats, and at least `floor_seconds`.
    """

    def __init__(self, floor_seconds: float, *, rank: int = 0) -> None:
        self.floor_seconds = floor_seconds
        self.rank = rank
        self.report: Callable[[str], None] | None = None
        self.every_tick: Callable[[], None] | None = None
        self._longest: float | None = None
        self._last = time.monotonic()
        self._ended = threading.Event()

    def start(self) -> None:
        """Watch from now on, in a thread that ends with the process."""
        self._last = time.monotonic()
        threading.Thread(target=self._watch, name="hang watch", daemon=True).start()

    def stop(self) -> None:
        """Watch no longer."""
        self._ended.set()

    @property
    def bound_seconds(self) -> float:
        """How long the present silence may last."""
        if self._longest is None:
            return max(self.floor_seconds, SET_UP_SECONDS)
        return max(self.floor_seconds, PATIENCE * self._longest)

    def begin_training(self) -> None:
        """From here on silences are measured; what came before was set-up."""
        self._longest, self._last = 0.0, time.monotonic()

    def end_training(self) -> None:
        """The rest (the adapter, samples) has the patience of the set-up again."""
        self._longest, self._last = None, time.monotonic()

    def beat(self) -> None:
        """This rank has got on."""
        now = time.monotonic()
        if self._longest is not None:
            self._longest = max(self._longest, now - self._last)
        self._last = now

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._ended.wait(TICK_SECONDS):
            now = time.monotonic()
            paused = now - before - TICK_SECONDS
            before = now
            if paused > 10 * TICK_SECONDS:
                self._last += paused  # the whole process stood still (scontrol suspend): that is no hang
            if self.every_tick is not None:
                self.every_tick()
            if now - self._last > self.bound_seconds:
                self._end_process(now - self._last)

    def _end_process(self, seconds: float) -> None:
        """Stacks of every thread to stderr, the reason to the run's records, and out."""
        reason = f"rank {self.rank}: no progress for {seconds:.0f} s (the bound was {self.bound_seconds:.0f} s)"
        print(f"lora-jobs: {reason}; where each thread stands:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        # A file system that hangs must not keep this process: then it ends without the record.
        faulthandler.dump_traceback_later(30, exit=True)
        if self.report is not None:
            self.report(reason)
        sys.stderr.flush()
        os._exit(EXIT_HANG)
