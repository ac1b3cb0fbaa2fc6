"""One attempt of one run, from the loaded spec to the finished adapter."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from transformers import EarlyStoppingCallback, PrinterCallback
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lora_jobs.errors import RunError
from lora_jobs.runs import list_committed_steps, load_metrics
from lora_jobs.training.agreement import Agreement
from lora_jobs.training.arguments import build_arguments
from lora_jobs.training.callbacks import AlreadyTrained, JointSave, Opening
from lora_jobs.training.convert import convert_checkpoint, needs_conversion
from lora_jobs.training.data import Examples, load_examples
from lora_jobs.training.deadline import Pace, Watch, find_end_time
from lora_jobs.training.entry import SavedStop
from lora_jobs.training.finish import finish_run, load_best_weights
from lora_jobs.training.libraries import prepare_libraries
from lora_jobs.training.model import add_adapter, load_base_model, load_tokenizer, widen_adapters
from lora_jobs.training.probe import Probe
from lora_jobs.training.provenance import describe_inputs
from lora_jobs.training.record import Recorder, find_prediction
from lora_jobs.training.reports import close_reports, guard_reports, place_before_reports, place_reports
from lora_jobs.training.schedule import PresentRate
from lora_jobs.training.surroundings import describe_place, record_surroundings
from lora_jobs.training.trainers import OwnSFTTrainer, OwnTrainer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

    from lora_jobs.runs import Attempt, Run
    from lora_jobs.spec import JobSpec
    from lora_jobs.training.hang import HangWatch
    from lora_jobs.training.launch import Launch
    from lora_jobs.training.signals import StopFlag

VERSIONS = ("torch", "transformers", "peft", "trl", "accelerate", "deepspeed", "datasets")


def run_training(
    run: Run, spec: JobSpec, attempt: Attempt, launch: Launch, stop: StopFlag, hang: HangWatch
) -> dict[str, Any]:
    """Train to the end, save the adapter, return {"adapter", "steps", "losses"}; SavedStop after a signalled save."""
    prepare_libraries(spec)
    refuse_missing_gpu(run, launch)
    place_reports(run, os.environ)
    resume_from = run.checkpoints / attempt.resume_from if attempt.resume_from else None
    converts = needs_conversion(resume_from, launch.world_size)
    args = build_arguments(spec, run, load_universal=converts)
    if args.world_size != launch.world_size:
        raise RunError(f"{launch.world_size} processes were started, but torch.distributed joined {args.world_size}")
    agreement = Agreement(args.world_size)
    predicted = find_prediction(load_estimate(run))
    recorder = Recorder(run, attempt, predicted_bytes=predicted) if launch.rank == 0 else None
    leave_if_asked(agreement, stop, recorder)
    tokenizer = load_tokenizer(spec.model)
    train = load_examples(spec.data.train, spec.data, tokenizer)
    held_out = load_examples(spec.data.eval, spec.data, tokenizer) if spec.data.eval else None
    model = load_model(spec, args)
    leave_if_asked(agreement, stop, recorder)
    facts = describe_process(launch, args, attempt=attempt.number)
    places = agreement.gather(describe_place(launch))
    if recorder is not None:
        record_opening(recorder, run, model, train, held_out, facts)
        inputs = describe_inputs(run, spec.model, args, model.config, tokenizer, train)
        record_surroundings(run, attempt.number, places, inputs)
        facts |= inputs
    trainer = build_trainer(spec, args, model, tokenizer, train, held_out)
    guard_reports(trainer)
    trainer.add_callback(Watch(Pace(find_end_time(launch, os.environ), now=time.time()), stop, hang))
    add_callbacks(trainer, spec, run, agreement, stop, recorder, metadata=facts, resume_from=resume_from)
    try:
        with (
            converted(resume_from if converts else None, run, agreement, recorder) as other,
            contextlib.suppress(AlreadyTrained),
        ):
            start = other or resume_from
            trainer.train(resume_from_checkpoint=str(start) if start else None)
        if args.load_best_model_at_end:
            load_best_weights(trainer, run, agreement, recorder)
        return finish_run(trainer, run, spec, agreement, recorder, metadata=facts, beat=hang.beat)
    finally:
        # Last: the evaluation of the finished adapter is reported, too.
        close_reports()
        if recorder is not None:
            recorder.learn_constants(facts["device"], facts["world_size"])


def leave_if_asked(agreement: Agreement, stop: StopFlag, recorder: Recorder | None) -> None:
    """Before the first step there is nothing to save: a signal during the set-up is followed at once, by all ranks."""
    if not agreement.any(stop.raised):
        return
    if recorder is not None:
        recorder.note("saved", step=recorder.attempt.first_step, signal=stop.reason or "a signal to another rank")
        recorder.say("stopping before the first step: nothing is to be saved")
    raise SavedStop


@contextlib.contextmanager
def converted(
    checkpoint: Path | None, run: Run, agreement: Agreement, recorder: Recorder | None
) -> Iterator[Path | None]:
    """The checkpoint in a form for the present number of processes, made by rank 0 and gone afterwards."""
    target = run.directory / "converted"
    if checkpoint is not None and recorder is not None:
        recorder.say(f"converting {checkpoint.name} to {agreement.world_size} process(es)")
        convert_checkpoint(checkpoint, target, world_size=agreement.world_size)
    agreement.wait()
    try:
        yield None if checkpoint is None else target
    finally:
        if checkpoint is not None and recorder is not None:
            shutil.rmtree(target, ignore_errors=True)


def refuse_missing_gpu(run: Run, launch: Launch) -> None:
    """A Slurm job that was sized for a GPU must not train on the CPU for hours because a driver is broken."""
    if torch.cuda.is_available() or launch.backend != "slurm" or os.environ.get("LORA_JOBS_ALLOW_CPU") == "1":
        return
    gpu = load_estimate(run).get("gpu", {}).get("name", "cpu")
    if gpu != "cpu":
        raise RunError(
            f"{launch.host} shows no GPU to torch, and the job was sized for {gpu}",
            hint="look at nvidia-smi on that node and exclude it; LORA_JOBS_ALLOW_CPU=1 trains on the CPU all the same",
        )


def load_estimate(run: Run) -> dict[str, Any]:
    """estimate.json of the submission; empty where there is none."""
    try:
        return dict(json.loads(run.estimate_path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}


def load_model(spec: JobSpec, args: TrainingArguments) -> PeftModel:
    """Base model and fresh adapter, ready for the trainer."""
    base = load_base_model(
        spec.model, device=args.device, activation_checkpointing=spec.training.activation_checkpointing
    )
    zero_stage = spec.deepspeed.zero_stage if spec.deepspeed is not None else None
    model = add_adapter(base, spec, zero_stage=zero_stage)
    if spec.training.activation_checkpointing and spec.training.trainer == "transformers":
        model.enable_input_require_grads()
    return model


def build_trainer(
    spec: JobSpec,
    args: TrainingArguments,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Examples,
    held_out: Examples | None,
) -> Trainer:
    """TRL's trainer with its fused loss, or the plain one with the stock loss; both on the same tokens."""
    sets = {"train_dataset": train.dataset, "eval_dataset": held_out.dataset if held_out else None}
    if spec.training.trainer == "trl":
        trainer = OwnSFTTrainer(model=model, args=args, processing_class=tokenizer, **sets)
        if spec.training.fp16 and spec.model.quantization is not None:
            widen_adapters(model)
        return trainer
    collator = DataCollatorForLanguageModeling(
        pad_token_id=tokenizer.pad_token_id, pad_to_multiple_of=spec.data.pad_to_multiple_of
    )
    return OwnTrainer(model=model, args=args, processing_class=tokenizer, data_collator=collator, **sets)


def add_callbacks(
    trainer: Trainer,
    spec: JobSpec,
    run: Run,
    agreement: Agreement,
    stop: StopFlag,
    recorder: Recorder | None,
    *,
    metadata: dict[str, Any],
    resume_from: Path | None,
) -> None:
    """Early stopping, the record, the joint save. Collectives run in every rank, so every rank decides alike."""
    recorded = recorder is not None and any(row.get("phase") == "before" for row in load_metrics(run))
    wanted = trainer.eval_dataset is not None and not agreement.any(recorded)
    callbacks: list[TrainerCallback] = [
        PresentRate(),
        JointSave(
            run.checkpoints,
            agreement,
            stop,
            trainer.save_errors,
            metadata,
            recorder,
            estimated_bytes=int(load_estimate(run).get("checkpoint_bytes") or 0),
            known=list_committed_steps(run) if recorder is not None else (),
        ),
        Opening(
            trainer.evaluate if wanted else None,
            complete=resume_from is not None and is_complete(resume_from),
            recorder=recorder,
        ),
    ]
    if resume_from is not None:
        callbacks.insert(0, Probe(trainer, resume_from, agreement))
    if spec.training.early_stopping_patience is not None:
        callbacks.append(
            EarlyStoppingCallback(spec.training.early_stopping_patience, spec.training.early_stopping_threshold)
        )
    trainer.remove_callback(PrinterCallback)
    if recorder is not None:
        place_before_reports(trainer, recorder)
    for callback in callbacks:
        trainer.add_callback(callback)


def is_complete(checkpoint: Path) -> bool:
    """Whether training had reached its end (all steps, or early stopping) when this checkpoint was saved."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
    return bool(control.get("should_training_stop")) or state["global_step"] >= state["max_steps"]


def describe_process(launch: Launch, args: TrainingArguments, *, attempt: int) -> dict[str, Any]:
    """What a bit-exact repetition depends on: versions, device, processes and threads."""
    cuda = torch.cuda.is_available()
    return {
        "job_id": launch.job_id,
        "restart_count": launch.restart_count,
        "attempt": attempt,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "world_size": args.world_size,
        "threads": torch.get_num_threads(),
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in VERSIONS}},
    }


def record_opening(
    recorder: Recorder,
    run: Run,
    model: PeftModel,
    train: Examples,
    held_out: Examples | None,
    facts: dict[str, Any],
) -> None:
    """The note that opens an attempt, and its lines in the log."""
    trainable, total = model.get_nb_trainable_parameters()
    predicted = load_estimate(run).get("estimate", {}).get("peak_bytes")
    counts = {
        name: {"examples": len(part.dataset), "too_long": part.too_long, "empty": part.empty}
        for name, part in (("train", train), ("eval", held_out))
        if part is not None
    }
    recorder.note(
        "started",
        step=recorder.attempt.first_step,
        predicted_bytes=predicted,
        trainable_parameters=trainable,
        data=counts,
        **facts,
    )
    recorder.say(f"{total:,} parameters, {trainable:,} trained; {facts['world_size']} process(es) on {facts['device']}")
    for name, count in counts.items():
        left_out = f", {count['too_long']} longer than max_length and {count['empty']} without completion left out"
        recorder.say(
            f"{name}: {count['examples']} examples" + (left_out if count["too_long"] or count["empty"] else "")
        )
