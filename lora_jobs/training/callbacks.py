"""Stop, save and commit, as every rank does it together."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any, NoReturn

from transformers import TrainerCallback

from lora_jobs.checkpoints import clear_for_save, discard_unfinished, find_shortage, rotate_checkpoints
from lora_jobs.errors import LoraJobsError, RunError
from lora_jobs.runs import COMMITTED_EVENT
from lora_jobs.training.entry import SavedStop
from lora_jobs.training.saving import SaveErrors, SaveFailure, commit_together, explain_failure

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

    from transformers import TrainerControl, TrainerState, TrainingArguments

    from lora_jobs.training.agreement import Agreement
    from lora_jobs.training.record import Recorder
    from lora_jobs.training.signals import StopFlag


# Forward passes between two questions whether a signal came, where one optimizer step takes more of them than this.
SUBSTEPS_BETWEEN = 16
# Saves in a row that may fail or find no room before the run is stopped: work that can't be saved is work at risk.
MOST_MISSED = 2


class EvaluationLeft(Exception):  # noqa: N818 - a way out of Trainer.evaluate, not an error
    """Raised in every rank when a signal came during an evaluation that nothing depends on; the step is then saved."""


class AlreadyTrained(Exception):  # noqa: N818 - a way out of Trainer.train, not an error
    """Raised once everything is loaded, when the checkpoint to resume from is the end of the training."""


class JointSave(TrainerCallback):  # type: ignore[misc] # transformers has no types
    """At each step's end the ranks agree whether a signal came; a save is committed by all of them, or by none.

    A signalled stop leaves by an exception after the commit: `should_training_stop` would be stored in the checkpoint
    and stop the resumed training at once.
    """

    def __init__(
        self,
        directory: Path,
        agreement: Agreement,
        stop: StopFlag,
        errors: SaveErrors,
        metadata: Mapping[str, Any],
        recorder: Recorder | None,
        *,
        estimated_bytes: int = 0,
        known: Collection[int] = (),
    ) -> None:
        self.directory = directory
        self.agreement = agreement
        self.stop = stop
        self.errors = errors
        self.metadata = metadata
        self.recorder = recorder
        self.estimated_bytes = estimated_bytes
        self.known = set(known)
        self.stopping = False
        self.unsaved = False
        self.committed_step = 0
        self.substeps = 0
        self.missed = 0

    def on_train_begin(self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        self.committed_step = state.global_step
        if self.agreement.any(self.stop.raised):  # while model and checkpoint were loaded
            self._leave(state)

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
            control.should_save = self._make_room(state)

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
        if self.recorder is not None:
            with self.errors.kept((OSError, LoraJobsError)):  # the other ranks hear of it in the gather
                self.recorder.sync()
        failure = commit_together(
            self.directory / f"checkpoint-{state.global_step}",
            self.agreement,
            self.errors,
            step=state.global_step,
            rank=args.process_index,
            world_size=args.world_size,
            metadata={**self.metadata, "metric": state.best_metric},
        )
        if failure is not None:
            if self.recorder is not None:
                with contextlib.suppress(LoraJobsError):  # what stays there has no manifest: it is no checkpoint
                    discard_unfinished(self.directory / f"checkpoint-{state.global_step}")
            self._miss(state, failure, "save_failed")
            return
        self.missed = 0
        if self.recorder is not None:
            self._settle(state, self.recorder)
        self.unsaved = False
        self.committed_step = state.global_step
        # A signal that came during an evaluation or this very save: everything up to here is safe, so stop here.
        if self.agreement.any(self.stopping or self.stop.raised):
            self._leave(state)

    def _miss(self, state: TrainerState, failure: SaveFailure, event: str) -> None:
        """A save that was skipped or failed, in every rank alike. The run goes on once: the next one may succeed.

        After the last step it always goes on: the finished adapter is smaller than a checkpoint.
        """
        self.missed += 1
        if self.recorder is not None:
            self.recorder.note(event, step=state.global_step, rank=failure.rank, reason=failure.reason)
            self.recorder.say(f"checkpoint {state.global_step} was not committed: {failure}")
        stopping = self.agreement.any(self.stopping or self.stop.raised)
        if stopping or (self.missed >= MOST_MISSED and state.global_step < state.max_steps):
            raise failure.as_error(f"checkpoint {state.global_step} could not be saved")

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
        self.stopping = True
        control.should_save = control.should_save or self._make_room(state)

    def _make_room(self, state: TrainerState) -> bool:
        """Clear the place of a save and look whether it fits; all ranks get the same answer. False skips the save.

        After a signal a save is tried in any case: it may fit after all, and there is no next one.
        """
        failure = None
        if self.recorder is not None:
            try:
                clear_for_save(self.directory / f"checkpoint-{state.global_step}")
                shortage = find_shortage(self.directory, estimated_bytes=self.estimated_bytes)
                failure = None if shortage is None or self.stopping else SaveFailure(0, shortage, no_space=True)
            except (OSError, LoraJobsError) as error:
                failure = explain_failure(0, error)
        failure = self.agreement.gather(failure)[0]
        if failure is None:
            return True
        self._miss(state, failure, "save_skipped")
        return False

    def _settle(self, state: TrainerState, recorder: Recorder) -> None:
        """After a commit: say so, and remove what is not needed any more. Rank 0's."""
        recorder.say(f"checkpoint {state.global_step} committed")
        self.known.add(state.global_step)
        with contextlib.suppress(LoraJobsError):  # the manifest is there: a record of it is lost, no more
            recorder.note(COMMITTED_EVENT, step=state.global_step)
        best = state.best_global_step
        try:
            protect = {self.directory / f"checkpoint-{best}"} if best else set()
            committed = self.directory / f"checkpoint-{state.global_step}"
            rotation = rotate_checkpoints(
                self.directory, keep=2, protect=protect, committed=committed, known=self.known
            )
            for aside in rotation.set_aside:
                recorder.note("set_aside", step=state.global_step, path=aside.name)
                recorder.say(f"damaged, moved to {aside.name}; the reason is in {aside.name}.json")
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
