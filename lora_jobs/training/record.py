"""Rank 0's account of the training: rows of metrics.jsonl and plain lines in the log."""

from __future__ import annotations

import contextlib
import errno
import math
import time
from typing import TYPE_CHECKING, Any

import psutil
import torch
from transformers import TrainerCallback

from lora_jobs.errors import RunError
from lora_jobs.runs import append_metrics, load_metrics, observe_memory, record_constants, sync_metrics
from lora_jobs.sizing import detected_gpu
from lora_jobs.units import format_gib

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

    from transformers import TrainerControl, TrainerState, TrainingArguments

    from lora_jobs.runs import Attempt, Run

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


# A row of every step is in the file at once, and safe from a failing machine after this long, or at the next commit.
SECONDS_BETWEEN_SYNCS = 1.0


def measure_memory() -> dict[str, int]:
    """Bytes of torch's allocator at their highest so far (0 without a GPU); this process on the host now; and, on a
    GPU, what the whole device lends now beside what the allocator holds now.
    """
    host = {"host_memory_bytes": int(psutil.Process().memory_info().rss)}
    if not torch.cuda.is_available():
        return {"memory_allocated_bytes": 0, "memory_reserved_bytes": 0, **host}
    free, total = torch.cuda.mem_get_info()
    return {
        "memory_allocated_bytes": torch.cuda.max_memory_allocated(),
        "memory_reserved_bytes": torch.cuda.max_memory_reserved(),
        "memory_reserved_now_bytes": torch.cuda.memory_reserved(),
        "memory_device_used_bytes": total - free,
        **host,
    }


def find_prediction(estimate: Mapping[str, Any]) -> int | None:
    """What estimate.json has beside the bytes measured here: torch's peak on a GPU, the whole process without one."""
    key = "allocated_peak_bytes" if torch.cuda.is_available() else "peak_bytes"
    predicted: int | None = estimate.get("estimate", {}).get(key)
    return predicted


def describe_memory(memory: Mapping[str, int]) -> str:
    """Allocated by torch on a GPU, else held by the process; and what was predicted for it."""
    held = format_gib(memory["memory_allocated_bytes"] or memory["host_memory_bytes"])
    predicted = memory.get("memory_predicted_bytes")
    return f"memory {held}" + (f" of {format_gib(predicted)} predicted" if predicted else "")


def perplexity(loss: float) -> float | None:
    """exp of a mean loss per token; None where it is out of range."""
    return math.exp(loss) if loss < 700 else None


class Recorder(TrainerCallback):  # type: ignore[misc] # transformers has no types
    """Writes what happens. Lives on rank 0 only: no collective may depend on it.

    Placed before the trackers: its speed and memory join the logs that they report.
    """

    def __init__(self, run: Run, attempt: Attempt, *, predicted_bytes: int | None = None) -> None:
        self.run = run
        self.attempt = attempt
        self.predicted = {} if predicted_bytes is None else {"memory_predicted_bytes": predicted_bytes}
        self.phase = "during"
        self.last_eval: tuple[int, float] | None = None
        self._began = time.monotonic()
        self._seconds = 0.0
        self._tokens = 0.0
        self._synced = time.monotonic()

    def note(self, event: str, **values: Any) -> None:
        """A row of kind "note" about this attempt."""
        self._write({"kind": "note", "event": event, **values})

    def say(self, line: str) -> None:
        """One line in logs/attempt-K.out; lost where the disk is full."""
        with contextlib.suppress(OSError):
            print(line, flush=True)

    def on_train_begin(self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        self._tokens = float(state.num_input_tokens_seen)

    def on_step_begin(self, _args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        self._began = time.monotonic()

    def on_step_end(self, _args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        self._seconds += time.monotonic() - self._began

    def on_log(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        logs: MutableMapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        speed = (state.num_input_tokens_seen - self._tokens) / self._seconds if self._seconds else 0.0
        self._tokens, self._seconds = float(state.num_input_tokens_seen), 0.0
        row = {key: logs[key] for key in ("loss", "learning_rate", "grad_norm") if key in logs}
        place = {"step": state.global_step, "max_steps": state.max_steps, "epoch": state.epoch}
        memory = {**measure_memory(), **self.predicted}
        measured = {"tokens_per_second": round(speed, 2), **memory}
        logs.update(measured)
        self._write({"kind": "train", **place, **row, **measured})
        self.say(
            f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}  "
            f"grad norm {logs.get('grad_norm', math.nan):.3f}  {speed:.0f} tokens/s  "
            f"{describe_memory(memory)}"
        )

    def on_evaluate(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        if metrics is not None and "eval_loss" in metrics:
            self.record_eval(state, metrics["eval_loss"])

    def record_eval(self, state: TrainerState, loss: float) -> None:
        """A row of kind "eval" of the present phase ("before", "during" or "after" the training), and its line."""
        self.last_eval = (state.global_step, loss)
        self._write(
            {
                "kind": "eval",
                "phase": self.phase,
                "step": state.global_step,
                "max_steps": state.max_steps,
                "epoch": state.epoch,
                "eval_loss": loss,
                "perplexity": perplexity(loss),
                **measure_memory(),
            }
        )
        when = {"before": "before training", "after": "after training"}.get(self.phase, f"at step {state.global_step}")
        self.say(f"held-out loss {when}: {loss:.4f} (perplexity {perplexity(loss) or math.inf:.2f})")

    def learn_constants(self, device: str, world_size: int) -> None:
        """What this run measured of its GPU type, for the margins of later checks; nothing on a CPU."""
        if not torch.cuda.is_available():
            return
        gpu = detected_gpu(device, torch.cuda.get_device_properties().total_memory).name
        with contextlib.suppress(RunError):
            rows = [row for row in load_metrics(self.run) if row.get("attempt") == self.attempt.number]
            observation = observe_memory(rows, gpu=gpu, world_size=world_size)
            if observation is not None:
                record_constants(self.run.directory.parent, self.run.id, observation)

    def record_final(self, step: int, metrics: Mapping[str, Any], targets: Mapping[str, Any]) -> None:
        """A row of kind "final": what the finished adapter reaches, beside what was expected; a line for each."""
        self._write({"kind": "final", "step": step, "metrics": dict(metrics), "targets": dict(targets)})
        for name, value in metrics.items():
            target = targets.get(name)
            met = "reached" if target and target["met"] else "NOT reached"
            self.say(f"{name}: {value:.4g}" + (f" (expected {target['expected']:g}: {met})" if target else ""))

    def sample(self, step: int, row: Mapping[str, str]) -> None:
        """A row of kind "sample": what the model answers with and without the adapter."""
        self._write({"kind": "sample", "step": step, **row})
        self.say(f"expected:        {row['expected']}")
        self.say(f"without adapter: {row['without_adapter']}")
        self.say(f"with adapter:    {row['with_adapter']}")

    def sync(self) -> None:
        """Make every row so far durable: a committed step's rows are there whatever happens next."""
        sync_metrics(self.run)
        self._synced = time.monotonic()

    def _write(self, row: dict[str, Any]) -> None:
        """A full disk costs rows, not the run: whether training may go on without saves is decided at the saves."""
        durable = row["kind"] != "train" or time.monotonic() - self._synced >= SECONDS_BETWEEN_SYNCS
        record = {"time": time.time(), "attempt": self.attempt.number, **row}
        try:
            append_metrics(self.run, record, durable=durable)
        except RunError as error:
            if not (isinstance(error.__cause__, OSError) and error.__cause__.errno in NO_SPACE):
                raise
        if durable:
            self._synced = time.monotonic()
