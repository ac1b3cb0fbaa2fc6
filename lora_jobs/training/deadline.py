"""When a job has to save by itself: its end time against how long a step and a save have taken."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from transformers import TrainerCallback

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_jobs.training.hang import HangWatch
    from lora_jobs.training.launch import Launch
    from lora_jobs.training.signals import StopFlag

# Until the first save is measured; a LoRA checkpoint is below 1 GB.
FIRST_SAVE_SECONDS = 10.0
# Steps differ in length, and so do saves on a shared disk.
STEP_SLACK, SAVE_SLACK = 1.25, 2.0
# For leaving, and for the batch script's last lines; never more than a tenth of the time that is left at the start.
LEAVING_SECONDS = 15.0
RECENT_STEPS = 20


def find_end_time(launch: Launch, environment: Mapping[str, str]) -> float | None:
    """When the job will be ended, in seconds since 1970: from the batch script, or the launcher's limit; else None."""
    if launch.backend == "slurm":
        told = environment.get("LORA_JOBS_END_TIME") or environment.get("SLURM_JOB_END_TIME") or ""
        return float(told) if told.isdecimal() else None
    limit = environment.get("SUBMITIT_LOCAL_TIMEOUT_S", "")
    return launch.started_after + float(limit) if limit.isdecimal() and launch.started_after else None


class Pace:
    """How long steps and saves take: the longest of the recent steps, the longest save. Seconds."""

    def __init__(self, end_time: float | None, *, now: float) -> None:
        self.end_time = end_time
        self.save_seconds = FIRST_SAVE_SECONDS
        self._measured_save = False
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self._leaving = 0.0 if end_time is None else min(LEAVING_SECONDS, max(0.0, end_time - now) / 10)

    def add_step(self, seconds: float) -> None:
        self._steps.append(seconds)

    def add_save(self, seconds: float) -> None:
        self.save_seconds = max(self.save_seconds, seconds) if self._measured_save else seconds
        self._measured_save = True

    def needed_seconds(self) -> float:
        """What one more step, a save and leaving take, with slack."""
        return STEP_SLACK * max(self._steps, default=0.0) + SAVE_SLACK * self.save_seconds + self._leaving

    def is_last_step(self, now: float) -> bool:
        """Whether another step and the save after it would not fit into what is left."""
        return self.end_time is not None and now + self.needed_seconds() > self.end_time


class Watch(TrainerCallback):  # type: ignore[misc] # transformers has no types
    """Each rank's own clock: tells the hang watch that it gets on, and asks to stop before the time is over."""

    def __init__(self, pace: Pace, stop: StopFlag, hang: HangWatch) -> None:
        self.pace = pace
        self.stop = stop
        self.hang = hang
        self._mark = time.monotonic()
        self._saved = False

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.hang.begin_training()
        self._mark = time.monotonic()

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.hang.beat()
        if self._saved:
            now = time.monotonic()
            self.pace.add_save(now - self._mark)
            self._saved, self._mark = False, now

    def on_substep_end(self, *_: object, **__: object) -> None:
        self.hang.beat()

    def on_step_end(self, *_: object, **__: object) -> None:
        self.hang.beat()
        now = time.monotonic()
        self.pace.add_step(now - self._mark)
        self._mark = now
        if self.pace.is_last_step(time.time()):
            self.stop.ask("the time limit (another step and its save would not fit)")

    def on_prediction_step(self, *_: object, **__: object) -> None:
        self.hang.beat()

    def on_evaluate(self, *_: object, **__: object) -> None:
        self.hang.beat()
        self._mark = time.monotonic()

    def on_save(self, *_: object, **__: object) -> None:
        self.hang.beat()
        self._saved = True

    def on_train_end(self, *_: object, **__: object) -> None:
        self.hang.end_training()
