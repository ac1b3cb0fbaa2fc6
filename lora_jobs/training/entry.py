"""What every process of a job runs. Torch is imported late: a job that cannot start says so in a second."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lora_jobs.errors import RunError
from lora_jobs.runs import EXIT_SAVED, Run, append_metrics
from lora_jobs.spec import JobSpec, load_spec
from lora_jobs.training.attempt import begin, end, find_own_attempt, wait_for_attempt
from lora_jobs.training.failures import Failure, classify_failure
from lora_jobs.training.launch import Launch, export_launch, read_launch, redirect_output
from lora_jobs.training.signals import StopFlag

if TYPE_CHECKING:
    from lora_jobs.runs import Attempt


class SavedStop(Exception):  # noqa: N818 - the wished-for end of a signalled attempt, not an error
    """Raised in every rank once the checkpoint that a signal asked for is committed."""


def train(run_directory: str) -> dict[str, Any]:
    """Train the run in this directory to its end: {"adapter", "steps", "losses", ...} of the finished adapter.

    Every rank calls it. Raises SystemExit with the code for the batch script: 85 after a saved stop, else an error's.
    """
    run, launch, stop = Run(Path(run_directory).resolve()), read_launch(os.environ), StopFlag()
    stop.install()
    result: dict[str, Any] = {}
    code = 0
    try:
        result = train_attempt(run, launch, stop)
    except SavedStop:
        code = EXIT_SAVED
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the last line of defence: one line, a status
        code = record_failure(run, launch, classify_failure(error))
    end_local(run, launch, code)
    if code != 0:
        leave(code)
    return result


def train_attempt(run: Run, launch: Launch, stop: StopFlag) -> dict[str, Any]:
    """Join or begin the attempt, prepare this process, and hand over to the loop."""
    spec = load_spec(run.spec_path)
    attempt = join_attempt(run, launch)
    if launch.world_size != spec.resources.world_size:
        raise RunError(f"the spec asks for {spec.resources.world_size} processes, {launch.world_size} were started")
    prepare_process(spec)
    distributed = launch.world_size > 1 or spec.deepspeed is not None
    export_launch(launch, run, attempt=attempt.number, distributed=distributed, environment=os.environ)
    from lora_jobs.training.loop import run_training

    return run_training(run, spec, attempt, launch, stop)


def join_attempt(run: Run, launch: Launch) -> Attempt:
    """The attempt of this start of the job: rank 0 begins it (under Slurm the batch script has), the others wait.

    Locally the output moves to the attempt's log files.
    """
    if launch.rank == 0:
        attempt, explanation = begin(run, launch)
    else:
        attempt, explanation = wait_for_attempt(run, launch), ()
    if launch.backend == "local":
        redirect_output(run, attempt.number)
    if launch.rank == 0:
        print(f"attempt {attempt.number} of {run.directory.name}: job {launch.job_id} on {launch.host}", flush=True)
        for line in explanation:
            print(line, flush=True)
    return attempt


def prepare_process(spec: JobSpec) -> None:
    """Threads and quiet libraries, and DeepSpeed told of a machine without a GPU: before they are imported."""
    os.environ.setdefault("OMP_NUM_THREADS", str(spec.resources.cpus_per_task))
    # Threads that spin while they wait for a core make a shared machine many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name in ("DeepSpeed", "torch.distributed", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def record_failure(run: Run, launch: Launch, failure: Failure) -> int:
    """Say what went wrong on stderr and in the run's records. Returns the exit code."""
    if failure.traceback:
        traceback.print_exc()
    print(f"lora-jobs: rank {launch.rank}: {failure.message}", file=sys.stderr, flush=True)
    with contextlib.suppress(Exception):
        attempt = find_own_attempt(run, launch)
        if attempt is not None:
            event = "lost_rank" if failure.secondary else "failed"
            note: dict[str, Any] = {"kind": "note", "event": event, "attempt": attempt.number, "rank": launch.rank}
            note["host"] = launch.host
            append_metrics(run, {**note, "reason": failure.message})
    return failure.exit_code


def end_local(run: Run, launch: Launch, exit_code: int) -> None:
    """Locally no batch script writes the attempt's end: rank 0 does; on a failure whichever rank is left."""
    if launch.backend != "local" or (launch.rank != 0 and exit_code in (0, EXIT_SAVED)):
        return
    attempt = find_own_attempt(run, launch)
    if attempt is not None and (launch.rank == 0 or not attempt.has_ended):
        end(run, attempt, exit_code)


def leave(code: int) -> NoReturn:
    """End this process with the code; at once where torch is loaded.

    A rank that still tears down its process group could hang on a lost peer, or be killed by srun meanwhile.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if "torch" in sys.modules:
        os._exit(code)
    raise SystemExit(code)
