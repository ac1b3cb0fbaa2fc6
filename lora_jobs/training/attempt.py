"""The begin and the end of an attempt, as the batch script and a local rank 0 write them.

python -m lora_jobs.training.attempt begin RUN        prints the attempt's number
python -m lora_jobs.training.attempt end RUN CODE     prints requeue (and nodes to exclude), stop or done
"""

from __future__ import annotations

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from lora_jobs.checkpoints import (
    WORLD_KEYS,
    best_level,
    choose_checkpoint,
    find_run_drift,
    list_allowed,
    list_failures,
    load_manifest,
    record_inputs,
    refuse_drift,
    require_own,
    set_failures_aside,
)
from lora_jobs.errors import CheckpointError, LoraJobsError, RunError
from lora_jobs.runs import (
    EXIT_HANG,
    EXIT_NO_CHECKPOINT,
    EXIT_NO_PROGRESS,
    EXIT_SAVED,
    NO_PROGRESS,
    Attempt,
    Run,
    begin_attempt,
    classify_end,
    decide_after,
    end_attempt,
    find_bad_nodes,
    is_stalled,
    list_committed_steps,
    list_recent_attempts,
    load_attempts,
    load_metrics,
    read_tail,
)
from lora_jobs.spec import load_spec
from lora_jobs.training.launch import Launch, read_launch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lora_jobs.runs import Diagnosis

STATES = {0: "COMPLETED", EXIT_SAVED: "SAVED"}

UNHEARD = frozenset({128 + signal.SIGTERM, 128 + signal.SIGUSR2})
"""A process that does not listen to our signals yet, since its shell or Python still starts, is ended by them."""

# What the batch script found out at its start: whether Slurm would requeue this job ("no": somebody has to resume it).
CAN_REQUEUE = "LORA_JOBS_CAN_REQUEUE"


class NoProgressError(RunError):
    """Two attempts committed nothing: a third would end the same way."""

    exit_code = EXIT_NO_PROGRESS


class NoGoodCheckpointError(CheckpointError):
    """Checkpoints were committed and none holds any more: starting over silently would hide the loss."""

    exit_code = EXIT_NO_CHECKPOINT


class Start(Struct, frozen=True):
    """Where an attempt starts: a checkpoint and its step, or the base model and step 0; and why, line by line."""

    checkpoint: Path | None
    step: int
    explanation: tuple[str, ...]


def choose_start(run: Run, *, world_size: int) -> Start:
    """The newest good checkpoint of a run, or the base model when none was ever committed.

    What was committed and is damaged is moved aside. Errors: NoGoodCheckpointError when all that were committed are
    damaged or gone; RunError for another number of processes, or for a directory that others can write.
    """
    require_own(run.directory.resolve(), run.checkpoints)
    choice = choose_checkpoint(run.checkpoints, level=best_level())
    known = list_committed_steps(run)
    lines = [f"{verdict.path.name}: {'good' if verdict.good else verdict.reason}" for verdict in choice.verdicts]
    if choice.chosen is None:
        refuse_loss(run, list_failures(choice, run.checkpoints, known=known))
        return Start(None, 0, (*lines, "starting from the base model"))
    manifest = load_manifest(choice.chosen)
    drift = find_run_drift(run, choice.chosen, load_spec(run.spec_path))
    allowed = list_allowed(run, drift, ())
    if manifest.world_size != world_size and not allowed.keys() & set(WORLD_KEYS):
        raise RunError(
            f"{choice.chosen.name} was saved by {manifest.world_size} processes, this job has {world_size}",
            hint=f"resume with nodes x gpus_per_node = {manifest.world_size}, or convert: "
            f"lora-jobs resume {run.id} --gpus {world_size}",
        )
    refuse_drift(drift, allowed)
    lines += [f"moved aside as {place.name}" for place, _ in set_failures_aside(choice, known=known)]
    return Start(choice.chosen, manifest.step, (*lines, f"resuming from {choice.chosen.name}"))


def refuse_loss(run: Run, failures: Sequence[str]) -> None:
    """Raise where something was committed and no checkpoint is good: by its manifest, or by the run's records."""
    if failures:
        raise NoGoodCheckpointError(
            f"no good checkpoint in {run.checkpoints}: {'; '.join(failures)}",
            path=run.checkpoints,
            hint=f"lora-jobs verify {run.id} shows what is wrong; "
            f"lora-jobs resume {run.id} --from-scratch starts over from the base model",
        )


def find_own_attempt(run: Run, launch: Launch) -> Attempt | None:
    """The attempt that this start of the job has already begun, None before its first line is written."""
    for attempt in reversed(load_attempts(run)):
        if attempt.job_id != launch.job_id or attempt.backend != launch.backend:
            continue
        if launch.backend == "local":
            return attempt if attempt.started_at >= launch.started_after else None
        if attempt.restart_count == launch.restart_count:
            return attempt
    return None


def begin(run: Run, launch: Launch) -> tuple[Attempt, tuple[str, ...]]:
    """Choose where to start and write the attempt's line; the same attempt again when it was begun already.

    Errors: those of `choose_start`; they are recorded as an attempt that failed at once.
    """
    if (attempt := find_own_attempt(run, launch)) is not None:
        return attempt, ()
    restart_count = launch.restart_count
    if launch.backend == "local":
        restart_count = sum(attempt.job_id == launch.job_id for attempt in load_attempts(run))
    write = partial(
        begin_attempt,
        run,
        job_id=launch.job_id,
        restart_count=restart_count,
        backend=launch.backend,
        host=launch.host,
    )
    try:
        world_size = load_spec(run.spec_path).resources.world_size
        write = partial(write, world_size=world_size)
        start = choose_start(run, world_size=world_size)
        refuse_stalled(run, start)
    except LoraJobsError as error:
        attempt = write(resume_from=None, first_step=0, refused=error.message)
        write_end(run, attempt, error.exit_code, "FAILED", error.message)
        raise
    attempt = write(resume_from=start.checkpoint.name if start.checkpoint else None, first_step=start.step)
    record_inputs(run, attempt.number, load_spec(run.spec_path))
    return attempt, start.explanation


def refuse_stalled(run: Run, start: Start) -> None:
    """A job that Slurm starts again and again (node failure, preemption) must not burn the budget for nothing."""
    if is_stalled(list_recent_attempts(run), start.step):
        raise NoProgressError(
            f"{NO_PROGRESS}: the newest is still step {start.step}",
            hint="see the log; a longer resources.time or smaller training.save_steps helps where time ran out; "
            "lora-jobs resume starts two more",
        )


def end(run: Run, attempt: Attempt, exit_code: int) -> str:
    """Write how an attempt ended and decide: "requeue" (with nodes to do without), "stop" or "done".

    What the ranks recorded beats the exit code: srun ends the slower ranks of a saved stop with a signal of its own.
    """
    notes = [row for row in load_metrics(run) if row.get("attempt") == attempt.number and "event" in row]
    events = {row["event"]: row for row in reversed(notes)}
    signalled = exit_code in UNHEARD and not is_begun(run, attempt)
    saved = {"unheard": explain_code(exit_code)} if signalled else events.get("saved", {})
    if exit_code != 0:
        exit_code = EXIT_SAVED if signalled or "saved" in events else EXIT_HANG if "hang" in events else exit_code
    state = STATES.get(exit_code, "FAILED")
    told = events.get("failed") or events.get("hang") or events.get("lost_rank") or {}
    reason = explain_end(state, exit_code, told, saved)
    diagnosis = diagnose_end(run, attempt, exit_code, told)
    node = told.get("host") or attempt.host if diagnosis.cause.blames_node else None
    write_end(run, attempt, exit_code, state, reason, cause=diagnosis.cause.name, bad_node=node)
    decision, why = decide_after(
        diagnosis.cause, attempts=list_recent_attempts(run), resume=load_spec(run.spec_path).resume
    )
    if decision == "requeue" and os.environ.get(CAN_REQUEUE) == "no":
        decision, why = "stop", "Slurm does not requeue this job"
    if why is not None:
        note = f"{reason}; not requeued: {why}"
        write_end(run, attempt, exit_code, state, note, cause=diagnosis.cause.name, bad_node=node)
        print(f"lora-jobs: {note}: lora-jobs resume {run.id} continues it", file=sys.stderr)
    return " ".join([decision, ",".join(find_bad_nodes(run))]).strip() if decision == "requeue" else decision


def is_begun(run: Run, attempt: Attempt) -> bool:
    """Whether any rank of an attempt got as far as its first record: all of them listened to signals by then."""
    return any(row.get("attempt") == attempt.number for row in load_metrics(run))


def diagnose_end(run: Run, attempt: Attempt, exit_code: int, told: Mapping[str, Any]) -> Diagnosis:
    """The cause of an end, from what a rank recorded, else from the attempt's log.

    Only a rank that was lost says nothing of why: then the log of all the ranks is read.
    """
    if told.get("event") == "failed":
        known = classify_end(log=str(told.get("reason", "")), exit_code=exit_code)
        if known.cause.name not in ("failed", "python_error"):
            return known
    logs = [run.logs / f"attempt-{attempt.number}.{suffix}" for suffix in ("out", "err")]
    return classify_end(log=f"{read_tail(logs)}\n{told.get('reason', '')}", exit_code=exit_code)


def explain_end(state: str, exit_code: int, told: Mapping[str, Any], saved: Mapping[str, Any]) -> str:
    """The end of an attempt in one line."""
    if state == "SAVED":
        return explain_save(saved)
    if state == "COMPLETED":
        return "finished"
    return str(told["reason"]) if "reason" in told else explain_code(exit_code)


def explain_save(note: Mapping[str, Any]) -> str:
    """The note of a saved stop in words; without one nobody says which signal it was."""
    if "unheard" in note:
        return f"{note['unheard']} before training began: nothing was to be saved"
    if "signal" not in note:
        return "saved on a signal"
    lost = f" (step {note['unfinished_step']} was unfinished and will be repeated)" if "unfinished_step" in note else ""
    return f"saved after {note['signal']}{lost}"


def write_end(
    run: Run,
    attempt: Attempt,
    exit_code: int,
    state: str,
    reason: str,
    *,
    cause: str | None = None,
    bad_node: str | None = None,
) -> None:
    """Write an attempt's end, with the newest step that is committed by then."""
    choice = choose_checkpoint(run.checkpoints, level=0)
    end_attempt(
        run,
        job_id=attempt.job_id,
        restart_count=attempt.restart_count,
        exit_code=exit_code,
        state=state,
        reason=reason,
        last_committed_step=load_manifest(choice.chosen).step if choice.chosen else None,
        cause=cause or classify_end(log=reason, exit_code=exit_code).cause.name,
        bad_node=bad_node,
    )


def explain_code(exit_code: int) -> str:
    """An exit code in words; above 128 it is the signal that ended the process."""
    if exit_code > 128:
        return f"ended by signal {exit_code - 128}"
    return f"exit code {exit_code}"


def wait_for_attempt(run: Run, launch: Launch, *, timeout_seconds: float = 1800.0) -> Attempt:
    """The attempt that rank 0 begins. Errors: RunError when no line appears in time."""
    deadline = time.monotonic() + timeout_seconds
    while (attempt := find_own_attempt(run, launch)) is None:
        if time.monotonic() > deadline:
            raise RunError(f"rank 0 began no attempt within {timeout_seconds:.0f} s in {run.attempts_path}")
        time.sleep(0.2)
    if attempt.has_ended:
        raise RunError(f"rank 0 could not begin attempt {attempt.number}: {attempt.reason}")
    return attempt


def main(arguments: Sequence[str]) -> int:
    """The two commands of the batch script. Returns the exit status."""
    try:
        match list(arguments):
            case ["begin", directory]:
                run = Run(Path(directory))
                attempt, explanation = begin(run, read_launch(os.environ))
                print(*explanation, sep="\n", file=sys.stderr)
                print(attempt.number)
            case ["end", directory, code]:
                run = Run(Path(directory))
                found = find_own_attempt(run, read_launch(os.environ))
                if found is None:
                    raise RunError(f"{run.attempts_path} has no attempt of this job", hint="was `begin` called?")
                print(end(run, found, int(code)))
            case _:
                print("usage: python -m lora_jobs.training.attempt begin RUN | end RUN CODE", file=sys.stderr)
                return 2
    except LoraJobsError as error:
        print(error.to_text(), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
