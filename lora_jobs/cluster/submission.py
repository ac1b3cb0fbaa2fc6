"""Handing a run to submitit: on Slurm with our own script, on this machine with as many processes as GPUs."""

from __future__ import annotations

import os
import pickle
import shlex
import socket
import sys
import time
import uuid
from typing import TYPE_CHECKING, Any

import psutil
from submitit.core.utils import DelayedSubmission, JobPaths
from submitit.local.local import LocalExecutor, LocalJob
from submitit.slurm.slurm import SlurmExecutor, SlurmJob

from lora_jobs.cluster.commands import clean_environment, find_command, run_command, start_detached
from lora_jobs.cluster.parsers import parse_submitted
from lora_jobs.cluster.refusals import explain_refusal
from lora_jobs.errors import CommandError, SubmissionError
from lora_jobs.runs import Submission
from lora_jobs.training.entry import train
from lora_jobs.units import parse_duration

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lora_jobs.rendering import Plan
    from lora_jobs.runs import Run

SUBMIT_SECONDS = 120.0
LAUNCHER = "lora_jobs.cluster.launch"
TASK_FILE = "submitit/task.pkl"
# As submitit has it; it requeues nothing itself, since the batch script does.
TIMEOUT_RETRIES = 3


class _ScriptExecutor(SlurmExecutor):
    """submitit's Slurm executor, sending exactly the script it is given. Private hooks: submitit is pinned."""

    def __init__(self, folder: Path, script: str) -> None:
        super().__init__(folder)
        self._script = script

    def _make_submission_file_text(self, command: str, uid: str) -> str:  # noqa: ARG002
        return self._script

    def _submit_command(self, command: str) -> SlurmJob[Any]:
        """As submitit's own, but through our door: a time limit, and nothing inherited from an enclosing job."""
        path = JobPaths.get_first_id_independent_folder(self.folder) / f".submission_file_{uuid.uuid4().hex}.sh"
        path.write_text(self._make_submission_file_text(command, ""), encoding="utf-8")
        job_id = call_sbatch(path)
        job: SlurmJob[Any] = SlurmJob(folder=self.folder, job_id=job_id, tasks=list(range(self._num_tasks())))
        job.paths.move_temporary_file(path, "submission_file")
        return job


class _DetachedExecutor(LocalExecutor):
    """submitit's local executor, with a launcher that neither Ctrl-C nor the end of this program stops."""

    def __init__(self, folder: Path, environment: Mapping[str, str], log: Path, *, python: str, tasks: int) -> None:
        super().__init__(folder, python=shlex.quote(python))
        self._environment = environment
        self._log = log
        self.update_parameters(tasks_per_node=tasks)

    def _submit_command(self, command: str) -> LocalJob[Any]:
        environment = {**self._environment, "SUBMITIT_LOCAL_COMMAND": command}
        argv = [sys.executable, "-P", "-m", LAUNCHER, str(self.folder)]
        pid = start_detached(argv, env=environment, log=self._log)
        return LocalJob(self.folder, str(pid), tasks=list(range(self._num_tasks())))

    @property
    def _submitit_command_str(self) -> str:
        return f"{self.python} -P -u -m submitit.core._submit {shlex.quote(str(self.folder))}"


def submit_slurm(plan: Plan, run: Run) -> Submission:
    """Queue the run with sbatch; its script is exactly `plan.script`. A refusal leaves nothing behind.

    Errors: SubmissionError with Slurm's words made plain; CommandError when sbatch is away.
    """
    refuse_without_slurm()
    resources = plan.spec.resources
    _make_folder(run.submitit)
    executor = _ScriptExecutor(run.submitit, plan.script)
    # The script says it all; these reach submitit's own record (time limit, one result per task).
    executor.update_parameters(
        time=-(-parse_duration(resources.time) // 60), nodes=resources.nodes, ntasks_per_node=resources.gpus_per_node
    )
    job = _submit(executor, run)
    return Submission(
        job_id=job.job_id,
        backend="slurm",
        submitted_at=time.time(),
        host=socket.gethostname(),
        pid_created_at=None,
    )


def render_task(run_directory: Path, time_limit: str) -> bytes:
    """What submitit loads on the node, for the run in this directory; the batch script names it after the job."""
    delayed = DelayedSubmission(train, str(run_directory))
    delayed.set_timeout(-(-parse_duration(time_limit) // 60), TIMEOUT_RETRIES)
    return pickle.dumps(delayed, pickle.HIGHEST_PROTOCOL)


def refuse_without_slurm() -> None:
    """SubmissionError where there is no Slurm on this machine."""
    if find_command("sbatch") is None or find_command("srun") is None:
        raise SubmissionError(
            "sbatch and srun are not on PATH: this machine is not part of a Slurm cluster",
            hint="log in to the cluster first, or use --cluster local to train on this machine",
        )


def submit_local(plan: Plan, run: Run) -> Submission:
    """Start the run on this machine, one process per `gpus_per_node`; it lives on when this program ends.

    The job id is the launcher's pid. Errors: SubmissionError, CommandError.
    """
    resources = plan.spec.resources
    if resources.nodes > 1:
        raise SubmissionError(
            f"resources.nodes is {resources.nodes}, this machine is one",
            hint="--set resources.nodes=1, with gpus_per_node as the number of processes",
        )
    for folder in (run.logs, run.submitit):
        _make_folder(folder)
    executor = _DetachedExecutor(
        run.submitit,
        render_local_environment(plan, run),
        run.logs / "local.out",
        python=plan.python,
        tasks=resources.gpus_per_node,
    )
    pid = int(_submit(executor, run).job_id)
    return Submission(
        job_id=str(pid),
        backend="local",
        submitted_at=time.time(),
        host=socket.gethostname(),
        pid_created_at=find_created_at(pid),
    )


def render_local_environment(plan: Plan, run: Run) -> dict[str, str]:
    """What the processes of a local run see: what the batch script exports, and what submitit's launcher reads."""
    resources = plan.spec.resources
    limit = parse_duration(resources.time)
    visible = {**os.environ, **plan.environment.environment}.get("CUDA_VISIBLE_DEVICES")
    return {
        **clean_environment(),
        "OMP_NUM_THREADS": str(resources.cpus_per_task),
        "TOKENIZERS_PARALLELISM": "false",
        **plan.environment.environment,
        "LORA_JOBS_RUN": str(run.directory),
        "CUDA_VISIBLE_DEVICES": choose_devices(visible, resources.gpus_per_node),
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_NTASKS": str(resources.gpus_per_node),
        "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
        "SUBMITIT_LOCAL_NODEID": "0",
        "SUBMITIT_LOCAL_TIMEOUT_S": str(limit),
        "SUBMITIT_LOCAL_SIGNAL_DELAY_S": str(min(plan.spec.resume.signal_seconds, limit // 2)),
        "SUBMITIT_LOCAL_WITH_SHELL": "",
        "SUBMITIT_STDERR_TO_STDOUT": "",
    }


def choose_devices(visible: str | None, count: int) -> str:
    """CUDA_VISIBLE_DEVICES for `count` processes: the first of those the user left visible, or 0, 1, ..."""
    devices = [str(index) for index in range(count)] if visible is None else visible.split(",")
    return ",".join(devices[:count])


def _submit(executor: _ScriptExecutor | _DetachedExecutor, run: Run) -> SlurmJob[Any] | LocalJob[Any]:
    """Write submitit's files and start the job; when it is refused the files of this attempt go again.

    Where nobody knows whether the job was queued (Ctrl-C, no answer) they stay: the job would need them.
    """
    before = set(run.submitit.iterdir())
    try:
        return executor.submit(train, str(run.directory))  # type: ignore[return-value]
    except OSError as error:
        _discard(run, before)
        raise _explain_unwritable(run.submitit, error) from error
    except SubmissionError:
        _discard(run, before)
        raise


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _explain_unwritable(folder, error) from error


def _explain_unwritable(folder: Path, error: OSError) -> SubmissionError:
    return SubmissionError(f"{folder} can't be written: {error.strerror}", hint="is the disk full, or not yours?")


def _discard(run: Run, before: set[Path]) -> None:
    for path in set(run.submitit.iterdir()) - before:
        path.unlink(missing_ok=True)


def call_sbatch(script: Path) -> str:
    """The job id of one sbatch call. Errors: SubmissionError, CommandError."""
    try:
        answer = run_command(["sbatch", "--parsable", str(script)], timeout=SUBMIT_SECONDS)
    except CommandError as error:
        hint = "`squeue --me` shows whether the job was queued in spite of it"
        raise CommandError(error.message, hint=hint) from error
    if answer.returncode != 0:
        refusal = explain_refusal(answer.stderr or answer.stdout)
        raise SubmissionError(f"sbatch refuses the job: {refusal.message}", hint=refusal.hint)
    return parse_submitted(answer.stdout)


def find_created_at(pid: int) -> float | None:
    """Start time of a process, which tells it from a later one with the same pid; None when it has ended."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return None
