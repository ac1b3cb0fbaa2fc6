"""What a resume costs and changes: the cause of the end, the work that is lost, another number of GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from lora_jobs.checkpoints import load_manifest
from lora_jobs.errors import SpecError
from lora_jobs.runs import Diagnosis, classify_end, find_cause, latest_metrics, load_attempts, read_tail

if TYPE_CHECKING:
    from pathlib import Path

    from lora_jobs.runs import Run
    from lora_jobs.spec import JobSpec
    from lora_jobs.workflows.observing import RunStatus


class Loss(Struct, frozen=True):
    """Work that has to be done again: steps beyond the checkpoint, and the seconds that they took."""

    steps: int = 0
    seconds: float = 0.0


def measure_loss(run: Run, chosen: Path | None) -> Loss:
    """From the chosen checkpoint to the last step that was recorded."""
    last = latest_metrics(run, "train")
    if last is None:
        return Loss()
    attempts = load_attempts(run)
    manifest = load_manifest(chosen) if chosen is not None else None
    step = manifest.step if manifest else 0
    since = manifest.created_at if manifest else next((each.started_at for each in attempts), last["time"])
    # Where an attempt has already begun at this checkpoint, only its own time is lost by this stop.
    since = max([since, *(each.started_at for each in attempts if each.first_step == step)])
    steps = max(0, last["step"] - step)
    return Loss(steps, round(max(0.0, last["time"] - since), 1) if steps else 0.0)


def diagnose_status(run: Run, status: RunStatus) -> Diagnosis | None:
    """Why the run stopped: recorded by its last attempt, else from Slurm's state and the attempt's log."""
    attempts = load_attempts(run)
    if not attempts:
        return None
    last = attempts[-1]
    recorded = find_cause(last.cause)
    if recorded is not None and recorded.name != "failed":
        return Diagnosis(recorded, last.reason)
    logs = [run.logs / f"attempt-{last.number}.{suffix}" for suffix in ("out", "err")]
    logs += sorted(run.logs.glob("slurm-*.out"))[-1:]
    return classify_end(log=f"{read_tail(logs)}\n{last.reason or ''}", exit_code=last.exit_code, state=status.state)


def arrange_gpus(stored: JobSpec, gpus: int | None) -> list[str]:
    """The overrides that put a run on `gpus` processes with the same global batch. Errors: SpecError."""
    if gpus is None or gpus == stored.resources.world_size:
        return []
    before = stored.resources
    sequences = stored.training.gradient_accumulation_steps * before.world_size
    if gpus < 1 or sequences % gpus:
        choices = [str(number) for number in range(1, sequences + 1) if sequences % number == 0]
        raise SpecError(
            f"--gpus {gpus} can't keep the global batch: {before.world_size} processes x "
            f"{stored.training.gradient_accumulation_steps} accumulation steps",
            hint=f"--gpus {', '.join(choices)} divide it",
        )
    nodes = before.nodes if gpus % before.nodes == 0 else 1
    return [
        f"resources.nodes={nodes}",
        f"resources.gpus_per_node={gpus // nodes}",
        f"training.gradient_accumulation_steps={sequences // gpus}",
    ]


def list_inexact(stored: JobSpec, spec: JobSpec) -> tuple[str, ...]:
    """What another number of processes changes: sums in another order, random numbers, the end of an epoch."""
    if stored.resources.world_size == spec.resources.world_size:
        return ()
    found = ["sums over micro-batches are taken in another order: the last bits may differ"]
    if spec.lora.lora_dropout > 0:
        found.append("lora.lora_dropout: other processes draw other random numbers")
    if spec.training.num_train_epochs is not None or spec.training.max_steps is None:
        found.append("the last, incomplete batch of an epoch is divided in another way")
    return tuple(found)
