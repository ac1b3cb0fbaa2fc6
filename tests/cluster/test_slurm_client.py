"""The client against a real Slurm: what is queued and why, what would be refused, cancelling and requeueing."""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING

import pytest
from slurm_cluster import OTHER_ACCOUNT

from lora_jobs.cluster.client import cancel_job, check_submission, requeue_job
from lora_jobs.cluster.observation import observe_jobs
from lora_jobs.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from slurm_cluster import SlurmCluster

    from lora_jobs.cluster.parsers import SlurmJob

pytestmark = pytest.mark.slurm

ALL_GPUS = ("--nodes=2", "--gpus-per-node=4", "--time=00:30:00")
ONE_GPU = ("--gpus-per-node=1", "--time=00:10:00")


def submit(slurm: SlurmCluster, directory: Path, *options: str, body: str = "sleep 300") -> str:
    script = directory / "job.sh"
    script.write_text(f"#!/bin/bash\n{body}\n")
    answer = slurm.call("sbatch", "--parsable", f"--output={directory}/%j.out", *options, str(script))
    return answer.stdout.strip()


def wait_for(job_id: str, ready: Callable[[SlurmJob], bool], seconds: float = 90) -> SlurmJob:
    deadline = time.monotonic() + seconds
    while True:
        answers = observe_jobs([job_id], ranked=False)
        sighting = answers.jobs.get(job_id)
        if sighting is not None and ready(sighting.job):
            return sighting.job
        assert time.monotonic() < deadline, answers
        time.sleep(0.3)


def test_running_waiting_dependent_and_array_jobs(slurm: SlurmCluster, tmp_path: Path):
    running = submit(slurm, tmp_path, *ALL_GPUS)
    wait_for(running, lambda job: job.state == "RUNNING")
    waiting = submit(slurm, tmp_path, *ONE_GPU)
    dependent = submit(slurm, tmp_path, *ONE_GPU, f"--dependency=afterok:{running}")
    array = submit(slurm, tmp_path, *ONE_GPU, "--array=0-3%2")
    # The scheduler writes the reasons, and the backfill scheduler the start, some time after the submission.
    blocked = {"Resources", "Priority"}
    expected = wait_for(waiting, lambda job: job.expected_start is not None and job.reason in blocked).expected_start
    wait_for(dependent, lambda job: job.reason == "Dependency")
    wait_for(f"{array}_2", lambda job: job.reason == "Priority")
    answers = observe_jobs([running, waiting, dependent, f"{array}_2", "4000000"])
    assert answers.notes == ()
    jobs = {job_id: sighting.job for job_id, sighting in answers.jobs.items()}
    seen = {job_id: (job.state, job.reason, job.partition, job.source) for job_id, job in jobs.items()}
    reason = jobs[waiting].reason
    assert reason in blocked
    assert seen == {
        running: ("RUNNING", None, "boost_usr_prod", "squeue"),
        waiting: ("PENDING", reason, "boost_usr_prod", "squeue"),
        dependent: ("PENDING", "Dependency", "boost_usr_prod", "squeue"),
        f"{array}_2": ("PENDING", "Priority", "boost_usr_prod", "squeue"),
    }
    job = jobs[waiting]
    assert expected is not None
    assert expected > (jobs[running].started or "")
    assert job.priority is not None
    assert job.factors is not None
    parts = job.factors.age, job.factors.fairshare, job.factors.job_size, job.factors.partition, job.factors.qos
    assert abs(sum(parts) - job.priority) <= 2, "sprio's parts add up to squeue's priority, but for rounding"
    assert (jobs[running].nodes, jobs[running].limit_seconds) == (2, 1800)


def test_accounting_answers_where_the_queue_does_not(
    slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ended, cancelled = submit(slurm, tmp_path, *ONE_GPU, body="exit 3"), submit(slurm, tmp_path, *ONE_GPU)
    wait_for(cancelled, lambda job: job.state == "RUNNING")
    cancel_job(cancelled)
    wait_for(ended, lambda job: job.state == "FAILED")
    only_sacct = tmp_path / "bin"
    only_sacct.mkdir()
    (only_sacct / "sacct").symlink_to(shutil.which("sacct") or "")
    monkeypatch.setenv("PATH", str(only_sacct))
    deadline = time.monotonic() + 120
    while True:  # slurmctld tells slurmdbd a little later
        answers = observe_jobs([ended, cancelled, "4000000"], ranked=False)
        jobs = {job_id: sighting.job for job_id, sighting in answers.jobs.items()}
        seen = {job_id: (job.state, job.exit_code, job.source) for job_id, job in jobs.items()}
        if seen == {ended: ("FAILED", "3:0", "sacct"), cancelled: ("CANCELLED", "0:0", "sacct")}:
            break
        assert time.monotonic() < deadline, answers
        time.sleep(0.3)
    assert answers.notes == ("queue not readable: squeue is not on PATH",)


def test_refusals_in_plain_words(slurm: SlurmCluster, tmp_path: Path):
    script = tmp_path / "job.sh"
    refused = {
        f"--account={OTHER_ACCOUNT}": "this account may not be used",
        "--partition=nope": "the cluster has no such partition",
        "--qos=nope": "this QOS does not exist",
        "--time=3-00:00:00": "the time is longer than the partition allows",
        "--nodes=3": "the partition has or allows fewer nodes",
        "--gpus-per-node=5": "no node of the partition has as many GPUs",
    }
    seen = {}
    for option in refused:
        script.write_text(f"#!/bin/bash\n#SBATCH --gpus-per-node=1 --time=10\n#SBATCH {option}\nsleep 1\n")
        test = check_submission(script)
        assert not test.accepted
        assert test.hint
        seen[option] = test.message
    assert {option: message.startswith(refused[option]) for option, message in seen.items()} == dict.fromkeys(
        refused, True
    ), seen
    assert slurm.call("squeue", "-h").stdout == "", "nothing was queued"


def test_accepted_with_a_forecast(slurm: SlurmCluster, tmp_path: Path):
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\n#SBATCH --nodes=2 --gpus-per-node=4 --time=10\nsleep 1\n")
    test = check_submission(script)
    assert test.accepted
    assert abs(time.mktime(time.strptime(test.expected_start or "", "%Y-%m-%dT%H:%M:%S")) - time.time()) < 60
    assert slurm.call("squeue", "-h").stdout == ""


def test_cancel_signal_and_requeue(slurm: SlurmCluster, tmp_path: Path):
    trap = "trap 'exit 7' USR2; echo ready; while :; do sleep 0.1; done"
    body = f'echo $SLURM_RESTART_COUNT >> {tmp_path}/starts\nsrun --output={tmp_path}/step bash -c "{trap}"'
    job_id = submit(slurm, tmp_path, *ONE_GPU, "--requeue", "--open-mode=append", body=body)
    wait_for(job_id, lambda _: (tmp_path / "step").exists())
    (tmp_path / "step").unlink()
    requeue_job(job_id)
    wait_for(job_id, lambda _: (tmp_path / "starts").read_text() == "\n1\n")
    wait_for(job_id, lambda _: (tmp_path / "step").exists() and "ready" in (tmp_path / "step").read_text())
    cancel_job(job_id, "USR2")
    job = wait_for(job_id, lambda job: job.state not in {"RUNNING", "COMPLETING"})
    assert job.state == "FAILED"
    other = submit(slurm, tmp_path, *ONE_GPU)
    cancel_job(other)
    assert wait_for(other, lambda job: job.state != "PENDING").state == "CANCELLED"
    with pytest.raises(ClusterError, match="Slurm does not know this job any more"):
        requeue_job("4000000")
