"""Stop, save and commit, as every rank does it together."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any, NoReturn

from transformers import TrainerCallback

from lora_jobs.checkpoints import MANIFEST, commit_checkpoint, discard_partial, rotate_checkpoints
from lora_jobs.errors import LoraJobsError, RunError
from lora_jobs.training.entry import SavedStop

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from transformers import TrainerControl, TrainerState, TrainingArguments

    from lora_jobs.training.agreement import Agreement
    from lora_jobs.training.record import Recorder
    from lora_jobs.training.signals import StopFlag


# Forward passes between two questions whether a signal came, where one optimizer step takes more of them than this.
SUBSTEPS_BETWEEN = 16


class EvaluationLeft(Exception):  # noqa: N818 - a way out of Trainer.evaluate, not an error
    """Raised in every rank when a signal came during an evaluation that nothing depends on; the step is then saved."""


class AlreadyTrained(Exception):  # noqa: N818 - a way out of Trainer.train, not an error
    """Raised once everything is loaded, when the checkpoint to resume from is the end of the training."""


class JointSave(TrainerCallback):  # type: ignore[misc] # transformers has no types
    """At each step's end the ranks agree whether a signal came; a save is committed by rank 0 once all have written.

    A signalled stop leaves by an exception after the commit: `should_training_stop` would be stored in the checkpoint
    and stop the resumed training at once.
    """

    def __init__(
        self,
        directory: Path,
        agreement: Agreement,
        stop: StopFlag,
        metadata: Mapping[str, Any],
        recorder: Recorder | None,
    ) -> None:
        self.directory = directory
        self.agreement = agreement
        self.stop = stop
        self.metadata = metadata
        self.recorder = recorder
        self.stopping = False
        self.unsaved = False
        self.committed_step = 0
        self.substeps = 0

    def on_train_begin(self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        self.committed_step = state.global_step

    def on_step_begin(self, _args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        self.unsaved = True
        self.substeps = 0

    def on_substep_end(self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Within a step of many forward passes: leave at once where every finished step is committed already."""
        self.substeps += 1
        if self.substeps % SUBSTEPS_BETWEEN or state.global_step != self.committed_step:
            return
        if self.agreement.any(self.stop.raised):
            self._leave(state, unfinished_step=state.global_step + 1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.stopping = self.agreement.any(self.stop.raised)
        if self.stopping:
            control.should_save = True
            # The grace is for the save; an evaluation is done first only where the best model or the patience needs it.
            control.should_evaluate = control.should_evaluate and args.metric_for_best_model is not None
        if control.should_save or control.should_evaluate:
            # on_log looks at the loss: what is not finite is never saved, also not after a signal in the evaluation
            control.should_log = True
        if control.should_save:
            self._make_room(state)

    def on_evaluate(self, _args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A signal that came during an evaluation: this step is saved, not the next."""
        if self.unsaved and not control.should_save and self.agreement.any(self.stop.raised):
            self._save_and_stop(state, control)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        for key, name in (("loss", "loss"), ("grad_norm", "gradient norm")):
            value = (logs or {}).get(key)
            # fp16's loss scaler looks for infinite gradients on purpose, and skips the step.
            if value is None or math.isfinite(value) or (key == "grad_norm" and args.fp16):
                continue
            raise RunError(
                f"the {name} is {value} at step {state.global_step}: nothing after it can be used",
                hint="lower training.learning_rate, or use bf16 instead of fp16; then resume from the last checkpoint",
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        self.agreement.wait()
        if self.recorder is not None:
            self._commit(args, state, self.recorder)
        self.agreement.wait()
        self.unsaved = False
        self.committed_step = state.global_step
        # A signal that came during an evaluation or this very save: everything up to here is safe, so stop here.
        if self.agreement.any(self.stopping or self.stop.raised):
            self._leave(state)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """An evaluation is left at once, unless the best model or the patience of a step to be saved depends on it.

        Before the first and after the last step there is nothing to save.
        """
        if self.unsaved and args.metric_for_best_model is not None:
            return
        if not self.agreement.any(self.stop.raised):
            return
        if not self.unsaved:
            self._leave(state)
        self._save_and_stop(state, control)
        raise EvaluationLeft

    def _save_and_stop(self, state: TrainerState, control: TrainerControl) -> None:
        if not control.should_save:
            self._make_room(state)
        self.stopping = control.should_save = True

    def _make_room(self, state: TrainerState) -> None:
        if self.recorder is not None:
            clear_for_save(self.directory / f"checkpoint-{state.global_step}")

    def _commit(self, args: TrainingArguments, state: TrainerState, recorder: Recorder) -> None:
        path = self.directory / f"checkpoint-{state.global_step}"
        recorder.sync()
        commit_checkpoint(path, step=state.global_step, world_size=args.world_size, metadata=self.metadata)
        recorder.say(f"checkpoint {state.global_step} committed")
        best = state.best_global_step
        try:
            protect = {self.directory / f"checkpoint-{best}"} if best else set()
            rotate_checkpoints(self.directory, keep=2, protect=protect)
        except (OSError, LoraJobsError) as error:
            recorder.note("rotation_failed", step=state.global_step, reason=str(error)[:300])
            recorder.say(f"older checkpoints stay for now: {error}")

    def _leave(self, state: TrainerState, *, unfinished_step: int | None = None) -> NoReturn:
        if self.recorder is not None:
            reason = self.stop.reason or "a signal to another rank"
            unfinished = {} if unfinished_step is None else {"unfinished_step": unfinished_step}
            self.recorder.note("saved", step=state.global_step, signal=reason, **unfinished)
            lost = "" if unfinished_step is None else f"; step {unfinished_step} was unfinished and will be repeated"
            self.recorder.say(f"stopping after {reason}: all work up to step {state.global_step} is saved{lost}")
        raise SavedStop


def clear_for_save(directory: Path) -> None:
    """Clear what lies where this step's checkpoint would go: an unfinished save is deleted.

    A committed one that did not verify is set aside under another name (a good one cannot be there, since training
    starts after the newest good one).
    """
    if directory.is_symlink():
        raise RunError(f"{directory} is a link: a checkpoint is never saved through one", hint="move the link away")
    if not os.path.lexists(directory / MANIFEST):
        if directory.exists():
            discard_partial(directory)
        return
    number = 1
    while (aside := directory.with_name(f"{directory.name}.set-aside-{number}")).exists():
        number += 1
    directory.rename(aside)


class Opening(TrainerCallback):  # type: ignore[misc] # transformers has no types
    """Just before the first step, with model, optimizer and checkpoint loaded: the evaluation of the untrained model.

    Like every evaluation it leaves no trace in the random states: runs with and without it are the same.
    """

    def __init__(self, evaluate: Callable[[], Any] | None, *, complete: bool, recorder: Recorder | None) -> None:
        self.evaluate = evaluate
        self.complete = complete
        self.recorder = recorder

    def on_train_begin(self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        if self.complete:
            raise AlreadyTrained
        if self.evaluate is None or state.global_step > 0:
            return
        if self.recorder is not None:
            self.recorder.phase = "before"
        self.evaluate()
        if self.recorder is not None:
            self.recorder.phase = "during"
