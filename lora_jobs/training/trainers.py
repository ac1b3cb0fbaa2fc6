"""Trainer and SFTTrainer, but for what we do in another way: saving, evaluating, loading the best weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DeepSpeedSchedulerWrapper
from transformers import Trainer
from trl import SFTTrainer

from lora_jobs.training.agreement import preserved_randomness
from lora_jobs.training.callbacks import EvaluationLeft
from lora_jobs.training.saving import SaveErrors, guard_engine


class OwnWays:
    """Before Trainer or SFTTrainer in a class's bases.

    An evaluation leaves no trace in the random states (its data loader draws a seed), so that one may be left out
    before a save and the resumed run is still the same. What fails while a checkpoint is written is kept in
    `save_errors` and not raised: the other ranks wait in a collective, and all hear of it at the commit.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        self.save_errors = SaveErrors()
        super().__init__(*args, **options)

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        with self.save_errors.kept((OSError,)):
            super()._save_checkpoint(*args, **options)  # type: ignore[misc] # Trainer's

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with self.save_errors.kept():
            super()._save(output_dir, state_dict)  # type: ignore[misc] # Trainer's
            # A pickle of our TrainingArguments: nobody needs it, and loading it runs code.
            (Path(str(output_dir)) / "training_args.bin").unlink(missing_ok=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:  # type: ignore[attr-defined] # Trainer's
            with self.save_errors.kept():
                super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc] # Trainer's
            return
        engine = self.model_wrapped  # type: ignore[attr-defined] # Trainer's
        guard_engine(engine, self.save_errors)
        # `latest` comes from us: DeepSpeed's rank 0 would fail on it while the others wait for rank 0.
        engine.save_checkpoint(output_dir, save_latest=False, exclude_frozen_parameters=True)
        if self.args.should_save:  # type: ignore[attr-defined] # Trainer's
            with self.save_errors.kept():
                (Path(output_dir) / "latest").write_text(f"global_step{engine.global_steps}", encoding="utf-8")
                self._save_own_scheduler(output_dir)

    def _save_own_scheduler(self, output_dir: str) -> None:
        """Trainer's scheduler beside DeepSpeed's files, which hold a scheduler only where DeepSpeed made it."""
        scheduler = self.lr_scheduler  # type: ignore[attr-defined] # Trainer's
        if not isinstance(scheduler, DeepSpeedSchedulerWrapper):
            torch.save(scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _save_scaler(self, output_dir: str) -> None:
        with self.save_errors.kept():
            super()._save_scaler(output_dir)  # type: ignore[misc] # Trainer's

    def _save_rng_state(self, output_dir: str) -> None:
        with self.save_errors.kept():
            super()._save_rng_state(output_dir)  # type: ignore[misc] # Trainer's

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
