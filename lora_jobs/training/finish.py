"""After the last step: held-out loss, the adapter, one answer with it and one without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_jobs.checkpoints import clear_for_save, verify_checkpoint
from lora_jobs.errors import LoraJobsError
from lora_jobs.runs import load_metrics
from lora_jobs.training.answers import generate
from lora_jobs.training.data import take_prompt
from lora_jobs.training.measures import measure_final
from lora_jobs.training.saving import commit_together, explain_failure

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import Trainer

    from lora_jobs.runs import Run
    from lora_jobs.spec import JobSpec
    from lora_jobs.training.agreement import Agreement
    from lora_jobs.training.record import Recorder
    from lora_jobs.training.trainers import OwnTrainer

# At most 32 tokens, and no three of them twice: small models get into loops.
SAMPLING = {"max_new_tokens": 32, "no_repeat_ngram_size": 3}


def finish_run(
    trainer: OwnTrainer,
    run: Run,
    spec: JobSpec,
    agreement: Agreement,
    recorder: Recorder | None,
    *,
    metadata: Mapping[str, Any],
    beat: Callable[[], None],
) -> dict[str, Any]:
    """Evaluate, save and commit the adapter, measure and sample it. Every rank calls it and gets the same result.

    `beat` tells the hang watch that this rank gets on.
    """
    evaluate_after(trainer, agreement, recorder)
    save_adapter(trainer, run, agreement, recorder, metadata)
    measure_final(trainer, spec.training, agreement, recorder, beat=beat)
    record_sample(trainer, recorder)
    agreement.wait()
    losses = {row["phase"]: row["eval_loss"] for row in load_metrics(run) if row.get("kind") == "eval"}
    return {
        "adapter": str(run.adapter),
        "steps": trainer.state.global_step,
        "losses": {"before": losses.get("before"), "after": losses.get("after")},
    }


def load_best_weights(trainer: OwnTrainer, run: Run, agreement: Agreement, recorder: Recorder | None) -> None:
    """The weights of the best evaluated step, by its number: the run may have been moved since it was saved.

    Where its checkpoint does not verify the last weights stay, and a note says so.
    """
    step = trainer.state.best_global_step
    if step is None:
        return
    best = run.checkpoints / f"checkpoint-{step}"
    verdict = verify_checkpoint(best) if recorder is not None else None
    if not agreement.any(verdict is not None and not verdict.good):
        trainer.load_weights(best)
    elif recorder is not None and verdict is not None:
        recorder.note("best_not_loaded", step=step, reason=verdict.reason)
        recorder.say(f"the adapter is of the last step: the best one, {best.name}, is no good: {verdict.reason}")


def evaluate_after(trainer: Trainer, agreement: Agreement, recorder: Recorder | None) -> None:
    """The held-out loss of the finished adapter; not measured twice when the last step was just evaluated."""
    if trainer.eval_dataset is None:
        return
    last = recorder.last_eval if recorder is not None else None
    fresh = last is not None and last[0] == trainer.state.global_step and not trainer.args.load_best_model_at_end
    if recorder is not None:
        recorder.phase = "after"
    if not agreement.any(fresh):
        trainer.evaluate()
    elif recorder is not None and last is not None:
        recorder.record_eval(trainer.state, last[1])


def save_adapter(
    trainer: OwnTrainer, run: Run, agreement: Agreement, recorder: Recorder | None, metadata: Mapping[str, Any]
) -> None:
    """adapter/ with the weights, their config and the tokenizer; its manifest last.

    Errors: every rank raises the same RunError when any of them could not write its part.
    """
    failure = None
    if recorder is not None:
        try:
            clear_for_save(run.adapter)
        except (OSError, LoraJobsError) as error:
            failure = explain_failure(0, error)
    if (failure := agreement.gather(failure)[0]) is not None:
        raise failure.as_error("the adapter could not be saved")
    trainer.save_model(str(run.adapter))
    failure = commit_together(
        run.adapter,
        agreement,
        trainer.save_errors,
        step=trainer.state.global_step,
        rank=trainer.args.process_index,
        world_size=trainer.args.world_size,
        metadata=metadata,
    )
    if failure is not None:
        raise failure.as_error("the adapter could not be saved")
    if recorder is not None:
        recorder.say(f"adapter saved in {run.adapter}")


def record_sample(trainer: Trainer, recorder: Recorder | None) -> None:
    """One held-out prompt, answered greedily with and without the adapter. Rank 0 only; not under ZeRO-3.

    A failure here is noted and changes nothing: the adapter is saved.
    """
    deepspeed = trainer.args.deepspeed
    if recorder is None or (deepspeed and deepspeed.get("zero_optimization", {}).get("stage") == 3):
        return
    dataset = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    if "input_ids" not in dataset.column_names or not (prompt := take_prompt(dataset[0])[0]):
        return
    model, tokenizer = trainer.model, trainer.processing_class
    try:
        model.eval()
        answer = generate(model, prompt, tokenizer, **SAMPLING)
        with model.disable_adapter():
            base = generate(model, prompt, tokenizer, **SAMPLING)
    except (RuntimeError, ValueError) as error:
        recorder.note("sample_failed", reason=str(error)[:300])
        return
    row = {
        "prompt": tokenizer.decode(prompt, skip_special_tokens=True),
        "expected": tokenizer.decode(take_prompt(dataset[0])[1], skip_special_tokens=True).strip(),
        "with_adapter": answer,
        "without_adapter": base,
    }
    recorder.sample(trainer.state.global_step, row)
