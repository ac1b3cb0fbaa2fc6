"""Experiment trackers beside metrics.jsonl: which of them a run reports to, and where each writes."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

    from transformers import Trainer, TrainerCallback

    from lora_jobs.runs import Run
    from lora_jobs.spec import TrainingSpec

# What a site without internet on its compute nodes exports, in the environment file or in the user's shell.
OFFLINE_MARKS = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


def choose_trackers(spec: TrainingSpec) -> list[str]:
    """By name, as TrainingArguments takes them: those of the spec, or TensorBoard where it is installed."""
    if spec.report_to is not None:
        return list(spec.report_to)
    return ["tensorboard"] if find_spec("tensorboard") is not None else []


def is_offline(environment: Mapping[str, str]) -> bool:
    """Whether the environment says that there is no internet."""
    return any(environment.get(name, "0").lower() not in ("", "0", "false", "no", "off") for name in OFFLINE_MARKS)


def place_reports(run: Run, environment: MutableMapping[str, str]) -> None:
    """Everything into the run's directory, under one id for all attempts; W&B without internet where there is none.

    What the user has set stays.
    """
    environment.setdefault("TENSORBOARD_LOGGING_DIR", str(run.directory / "tensorboard"))
    environment.setdefault("WANDB_DIR", str(run.directory))
    environment.setdefault("WANDB_NAME", run.id)
    environment.setdefault("WANDB_RUN_ID", run.id)
    environment.setdefault("WANDB_RESUME", "allow")
    environment.setdefault("WANDB_PROJECT", "lora-jobs")
    environment.setdefault("TRACKIO_DIR", str(run.directory / "trackio"))
    if is_offline(environment):
        environment.setdefault("WANDB_MODE", "offline")


class Harmless:
    """A tracker's callback whose first error is said in one line and is its last word: it never ends a run."""

    def __init__(self, tracker: TrainerCallback) -> None:
        self._tracker = tracker
        self._broken = False

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._tracker, name)
        if not name.startswith("on_"):
            return member

        def call(*arguments: Any, **options: Any) -> Any:
            if self._broken:
                return None
            try:
                return member(*arguments, **options)
            except Exception as error:  # noqa: BLE001 - another project's code, beside the training
                self._broken = True
                kind = type(self._tracker).__name__.removesuffix("Callback")
                print(f"lora-jobs: {kind} failed and is left out from here: {error}", file=sys.stderr, flush=True)
                return None

        return call


def guard_reports(trainer: Trainer) -> None:
    """Make every tracker of a trainer harmless: a full disk or a lost network costs its curves only."""
    from transformers.integrations import get_reporting_integration_callbacks

    trackers = tuple(get_reporting_integration_callbacks(trainer.args.report_to))
    handler = trainer.callback_handler
    handler.callbacks = [Harmless(each) if isinstance(each, trackers) else each for each in handler.callbacks]


def place_before_reports(trainer: Trainer, callback: TrainerCallback) -> None:
    """Have a callback called before the guarded trackers, so that they report what it adds to the logs."""
    callbacks = trainer.callback_handler.callbacks
    first = next((place for place, each in enumerate(callbacks) if isinstance(each, Harmless)), len(callbacks))
    callbacks.insert(first, callback)


def close_reports() -> None:
    """Let W&B and trackio write what they hold: a signalled attempt leaves no time at the interpreter's exit.

    What a tracker makes of it is never the end of a run.
    """
    wandb, trackio = sys.modules.get("wandb"), sys.modules.get("trackio")
    try:
        if wandb is not None and getattr(wandb, "run", None) is not None:
            wandb.finish()
        if trackio is not None and trackio.context_vars.current_run.get() is not None:
            trackio.finish()
    except Exception as error:  # noqa: BLE001 - another project's code, after the training
        print(f"lora-jobs: a tracker did not end well: {error}", file=sys.stderr, flush=True)
