"""A learning rate that was changed on purpose between two attempts takes effect, in spite of the stored state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


class PresentRate(TrainerCallback):  # type: ignore[misc] # transformers has no types
    """Once the checkpoint is loaded: where its schedule starts from another rate than the spec's, the spec's counts."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **_: object,
    ) -> None:
        if state.global_step > 0:
            set_base_rate(optimizer, lr_scheduler, args.learning_rate)


def set_base_rate(optimizer: Any, scheduler: Any, rate: float) -> None:
    """Give a schedule (torch's LambdaLR, wrapped or not) another base, and its optimizer the rate of the next step."""
    while not hasattr(scheduler, "base_lrs") and hasattr(scheduler, "scheduler"):
        scheduler = scheduler.scheduler
    if not hasattr(scheduler, "lr_lambdas") or all(base == rate for base in scheduler.base_lrs):
        return
    scheduler.base_lrs = [rate] * len(scheduler.base_lrs)
    rates = [rate * factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    scheduler._last_lr = rates
    for groups in (scheduler.optimizer.param_groups, optimizer.param_groups):
        for group, present in zip(groups, rates, strict=True):
            group["initial_lr"], group["lr"] = rate, present
