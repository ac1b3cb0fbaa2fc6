"""What else happens to a job on a real Slurm: daemons that die, kills, a forgetful controller, two resumes at once."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from slurm_cluster import wait_until
from test_end_to_end import (
    SPEC,
    find_reference,
    hash_adapter,
    home,
    submit,
    tiny,
    wait_for,
    wait_for_end,
    wait_for_step,
)  # fmt: skip

from lora_jobs.cluster.client import cancel_job
from lora_jobs.errors import LoraJobsError
from lora_jobs.runs import load_attempts, load_metrics
from lora_jobs.workflows.observing import observe_runs
from lora_jobs.workflows.resuming import plan_resume, resume_run
from lora_jobs.workflows.sweeping import SweepReport, submit_spec

if TYPE_CHECKING:
    from collections.abc import Callable

    from slurm_cluster import SlurmCluster
    from test_end_to_end import Tiny

    from lora_jobs.runs import Run

__all__ = ["home", "tiny"]  # fixtures
pytestmark = [pytest.mark.slurm, pytest.mark.train]

LONG = os.environ.get("LORA_JOBS_FAULTS") == "long"
long_form = pytest.mark.skipif(not LONG, reason="part of the long form: make faults")


@pytest.fixture
def record() -> Callable[..., None]:
    """Adds a row to the table of `make faults`."""

    def write(case: str, **values: Any) -> None:
        path = os.environ.get("LORA_JOBS_FAULTS_ROWS")
        if path is not None:
            with Path(path).open("a") as file:
                file.write(json.dumps({"group": "slurm", "case": case, **values}) + "\n")

    return write


def find_job(run: Run) -> str:
    return observe_runs([run]).runs[0].job_id or ""


def find_lost_steps(run: Run) -> int:
    """The most steps that any attempt had trained and the next had to repeat."""
    attempts = load_attempts(run)
    rows = [row for row in load_metrics(run) if row["kind"] == "train"]
    lost = 0
    for attempt, following in itertools.pairwise(attempts):
        reached = max((row["step"] for row in rows if row["attempt"] == attempt.number), default=attempt.first_step)
        lost = max(lost, reached - following.first_step)
    return lost


def measure_start(run: Run) -> float:
    """Seconds from the begin of the last attempt, with its checkpoint verified, to the end of its first step.

    How long a requeued job rests before that (two minutes) and waits for its nodes is Slurm's matter.
    """
    last = load_attempts(run)[-1]
    steps = [row["time"] for row in load_metrics(run) if row["kind"] == "train" and row["attempt"] == last.number]
    return round(min(steps) - last.started_at, 2)


def resume_until_done(run: Run) -> None:
    resume_run(plan_resume(run.id))
    wait_for_end(run)


@long_form
def test_scontrol_requeue(slurm: SlurmCluster, tiny: Tiny, record: Callable[..., None]):
    reference = find_reference(tiny)
    run = submit(tiny)
    wait_for_step(run, 5)
    slurm.call("scontrol", "requeue", find_job(run))
    wait_for_end(run)
    record("scontrol requeue", ours="same result", lost_steps=find_lost_steps(run),
           seconds_to_first_step=measure_start(run))  # fmt: skip
    assert len(load_attempts(run)) == 2
    assert hash_adapter(run) == reference.adapter


@long_form
def test_preemption_without_grace(slurm: SlurmCluster, tiny: Tiny, tmp_path: Path, record: Callable[..., None]):
    reference = find_reference(tiny)
    slurm.call("scontrol", "update", "PartitionName=boost_usr_prod", "GraceTime=0")
    try:
        run = submit(tiny)
        wait_for_step(run, 5)
        slurm.call(
            "sbatch", "--parsable", "--partition=boost_urgent", "--nodes=2", "--gpus-per-node=4", "--time=1",
            f"--output={tmp_path}/urgent.out", "--wrap=sleep 3",
        )  # fmt: skip
        wait_for(run, lambda status: (status.attempts or 0) >= 2)
        wait_for_end(run)
    finally:
        slurm.call("scontrol", "update", "PartitionName=boost_usr_prod", f"GraceTime={slurm.grace_seconds}")
    record("preemption without grace", ours="same result", lost_steps=find_lost_steps(run),
           seconds_to_first_step=measure_start(run))  # fmt: skip
    assert find_lost_steps(run) <= 5
    assert hash_adapter(run) == reference.adapter


@long_form
def test_slurmctld_restarted_mid_run(slurm: SlurmCluster, tiny: Tiny, record: Callable[..., None]):
    """Killed, away for five seconds, and back: the job does not notice."""
    reference = find_reference(tiny)
    run = submit(tiny)
    wait_for_step(run, 5)
    slurm.stop_process("slurmctld", signal.SIGKILL)
    time.sleep(5)
    slurm.start_process("slurmctld", "slurmctld", "-D", "-f", str(slurm.slurm_conf))
    wait_for_end(run)
    record("slurmctld killed and restarted", ours="same result", lost_steps=find_lost_steps(run))
    assert len(load_attempts(run)) == 1
    assert hash_adapter(run) == reference.adapter


@long_form
def test_a_slurmd_killed(slurm: SlurmCluster, tiny: Tiny, record: Callable[..., None]):
    """The daemon of the second node and its step die as with the node; Slurm or `resume` brings the run back."""
    reference = find_reference(tiny)
    run = submit(tiny)
    wait_for_step(run, 5)
    slurm.stop_process("lrdn0002", signal.SIGKILL)
    for process in psutil.process_iter(["name", "cmdline"]):
        words = process.info["cmdline"] or []
        if process.info["name"] == "slurmstepd" and any("lrdn0002" in file.path for file in process.open_files()):
            for child in [*process.children(recursive=True), process]:
                child.kill()
        assert words is not None
    slurm.call("scontrol", "update", "NodeName=lrdn0002", "State=DOWN", "Reason=test")
    slurm.start_node("lrdn0002")
    slurm.call("scontrol", "update", "NodeName=lrdn0002", "State=RESUME", check=False)
    wait_until(lambda: "lrdn0002" in slurm.call("sinfo", "-h", "-N", "-o", "%N %T").stdout, "the node", slurm.root)
    status = wait_for(run, lambda status: not status.active)
    if status.state != "COMPLETED":
        resume_until_done(run)
    record("a slurmd killed", ours="same result", lost_steps=find_lost_steps(run),
           seconds_to_first_step=measure_start(run))  # fmt: skip
    assert find_lost_steps(run) <= 5
    assert hash_adapter(run) == reference.adapter


def find_batch_shells(job_id: str) -> list[psutil.Process]:
    """The shells that run this job's batch script."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(f"job{int(job_id):05d}/slurm_script" in word for word in words):
            found.append(process)
    return found


@long_form
def test_kill_9_of_the_batch_shell(slurm: SlurmCluster, tiny: Tiny, record: Callable[..., None]):
    reference = find_reference(tiny)
    run = submit(tiny)
    wait_for_step(run, 5)
    shells = find_batch_shells(find_job(run))
    assert shells
    for shell in shells:
        shell.kill()
    status = wait_for(run, lambda status: not status.active and slurm.is_idle())
    ended = status.state
    if ended != "COMPLETED":
        resume_until_done(run)
    record("kill -9 of the batch shell", ours="same result", ours_detail=f"{ended}, resumed by hand",
           lost_steps=find_lost_steps(run))  # fmt: skip
    assert hash_adapter(run) == reference.adapter


@long_form
def test_an_id_that_slurmctld_has_forgotten(slurm: SlurmCluster, tiny: Tiny, record: Callable[..., None]):
    """MinJobAge has passed: `resume` by the old id still finds the run and submits a new job."""
    reference = find_reference(tiny)
    run = submit(tiny)
    wait_for_step(run, 5)
    job_id = find_job(run)
    cancel_job(job_id)
    wait_for(run, lambda status: not status.active and slurm.is_idle())
    wait_until(lambda: slurm.call("scontrol", "show", "job", job_id, check=False).returncode != 0,
               "slurmctld to forget the job", slurm.root, 180)  # fmt: skip
    resume_run(plan_resume(job_id))
    wait_for_end(run)
    record("an id that slurmctld has forgotten", ours="same result", lost_steps=find_lost_steps(run),
           seconds_to_first_step=measure_start(run))  # fmt: skip
    assert load_attempts(run)[-1].job_id != job_id
    assert hash_adapter(run) == reference.adapter


@long_form
def test_a_task_of_an_array_comes_back_alone(slurm: SlurmCluster, tiny: Tiny, record: Callable[..., None]):
    """Two tasks that train the same; one is signalled, requeued under its own id, and ends as the other one."""
    reference = find_reference(tiny)
    report = submit_spec(SPEC, tiny.overrides(), sweep=("training.logging_steps=1,2",), cluster="slurm")
    assert isinstance(report, SweepReport)
    assert report.sweep is not None
    undisturbed, signalled = report.sweep.runs
    wait_for_step(signalled, 5)
    task = find_job(signalled)
    cancel_job(task, "USR2")
    for run in report.sweep.runs:
        wait_for_end(run)
    first, second = load_attempts(signalled)
    record("a task of an array, signalled", ours="same result", lost_steps=find_lost_steps(signalled),
           seconds_to_first_step=measure_start(signalled))  # fmt: skip
    assert task.endswith("_1")
    assert [(each.state, each.job_id, each.restart_count) for each in (first, second)] == [
        ("SAVED", task, 0), ("COMPLETED", task, 1),
    ]  # fmt: skip
    assert len(load_attempts(undisturbed)) == 1
    assert {hash_adapter(run) for run in report.sweep.runs} == {reference.adapter}


@long_form
def test_two_resumes_at_once(slurm: SlurmCluster, tiny: Tiny, record: Callable[..., None]):
    """Both have made their plan before either acts: one submits, the other is refused."""
    reference = find_reference(tiny)
    run = submit(tiny)
    wait_for_step(run, 5)
    cancel_job(find_job(run))
    wait_for(run, lambda status: not status.active and slurm.is_idle())
    plans = [plan_resume(run.id), plan_resume(run.id)]

    def send(plan: Any) -> str:
        try:
            resume_run(plan)
        except LoraJobsError as error:
            return error.message
        return "sent"

    with ThreadPoolExecutor(2) as pool:
        answers = sorted(pool.map(send, plans))
    wait_for_end(run)
    record("two resumes at once", ours="one sent, one refused" if answers.count("sent") == 1 else "both sent",
           ours_detail="; ".join(answers), lost_steps=find_lost_steps(run))  # fmt: skip
    assert answers.count("sent") == 1, answers
    assert len(load_attempts(run)) == 2
    assert hash_adapter(run) == reference.adapter


@long_form
def test_resume_while_sacct_is_down(slurm: SlurmCluster, tiny: Tiny, record: Callable[..., None]):
    """Without slurmdbd the queue and the run's own records answer."""
    reference = find_reference(tiny)
    run = submit(tiny)
    wait_for_step(run, 5)
    cancel_job(find_job(run))
    wait_for(run, lambda status: not status.active and slurm.is_idle())
    slurm.stop_process("slurmdbd", signal.SIGKILL)
    try:
        resume_run(plan_resume(run.id))
        wait_for(run, lambda _: hash_exists(run))
    finally:
        slurm.start_process("slurmdbd", "slurmdbd", "-D")
        wait_until(lambda: slurm.call("sacctmgr", "-n", "list", "cluster", check=False).returncode == 0, "slurmdbd",
                   slurm.root)  # fmt: skip
    wait_for_end(run)
    record("sacct down", ours="same result", lost_steps=find_lost_steps(run),
           seconds_to_first_step=measure_start(run))  # fmt: skip
    assert hash_adapter(run) == reference.adapter


def hash_exists(run: Run) -> bool:
    return bool(load_attempts(run)) and load_attempts(run)[-1].state == "COMPLETED"
