"""Trainer and SFTTrainer, but for what we do in another way: evaluating, loading the best weights, no model card."""

from __future__ import annotations

import signal
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import Trainer
from trl import SFTTrainer

from lora_jobs.training.agreement import preserved_randomness
from lora_jobs.training.callbacks import EvaluationLeft
from lora_jobs.training.signals import STOP_SIGNALS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def begin_worker(then: Callable[[int], None] | None, number: int) -> None:
    """A data loading worker ignores what asks its rank to stop: without it the last step could not be finished.

    torch gives its workers a SIGTERM handler of their own, which ends them.
    """
    for name in STOP_SIGNALS:
        signal.signal(name, signal.SIG_IGN)
    if then is not None:
        then(number)


class OwnWays:
    """Before Trainer or SFTTrainer in a class's bases.

    An evaluation leaves no trace in the random states (its data loader draws a seed), so that one may be left out
    before a save and the resumed run is still the same.
    """

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        with preserved_randomness():
            metrics: dict[str, float] = super().evaluate(*args, **options)  # type: ignore[misc] # Trainer's
        return metrics

    def _evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        try:
            metrics: dict[str, float] = super()._evaluate(*args, **options)  # type: ignore[misc] # Trainer's
        except EvaluationLeft:
            return {}
        return metrics

    def _get_dataloader(self, *args: Any, **options: Any) -> Any:
        loader = super()._get_dataloader(*args, **options)  # type: ignore[misc] # Trainer's
        plain = getattr(loader, "base_dataloader", loader)
        plain.worker_init_fn = partial(begin_worker, plain.worker_init_fn)
        return loader

    def _load_best_model(self) -> None:
        """Trainer's own call, within `train`: left to `load_best_weights`, which verifies the checkpoint first."""

    def load_weights(self, checkpoint: Path) -> None:
        """Put a checkpoint's adapter into the model, in every rank, as Trainer loads its best one."""
        self.state.best_model_checkpoint = str(checkpoint)  # type: ignore[attr-defined] # Trainer's
        super()._load_best_model()  # type: ignore[misc] # Trainer's


class OwnTrainer(OwnWays, Trainer):  # type: ignore[misc] # transformers has no types
    """The plain trainer with the stock loss."""


class OwnSFTTrainer(OwnWays, SFTTrainer):  # type: ignore[misc] # trl has no types
    """TRL's trainer without the model card that it writes beside every checkpoint."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        return
