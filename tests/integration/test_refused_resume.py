"""A resume that is refused leaves the run as it was; Slurm's commands are fakes on PATH that say so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_jobs.runs import (
    Run,
    Submission,
    append_submission,
    begin_attempt,
    create_run,
    end_attempt,
    load_submissions,
)

ROOT = Path(__file__).resolve().parents[2]
FAKES = {
    "squeue": "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1",
    "sacct": "exit 0",
    "srun": "exit 1",
    "sbatch": "echo 'sbatch: error: Batch job submission failed: Invalid account or account/partition combination "
    "specified' >&2; exit 1",
}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run of the past, with two folders that look like checkpoints, whose job Slurm has forgotten."""
    (tmp_path / "bin").mkdir()
    for name, body in FAKES.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\n# A fake {name}, for tests.\n{body}\n")
        path.chmod(0o755)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "envs").mkdir()
    (tmp_path / "envs/here.yaml").write_text(
        "description: a test\nscheduler: slurm\ndefault_partition: p\npartitions: {p: {gpu: A100-64}}\n"
    )
    spec = (
        f"name: old\nmodel: {{name_or_path: smollm2-135m}}\nlora: {{r: 4}}\ndata: {{train: {tmp_path}/rows.jsonl}}\n"
        "training: {max_steps: 10}\nresources: {cluster: here}\n"
    )
    run = create_run(tmp_path / "runs", "old-1", {"spec.yaml": spec, "script.sbatch": "#!/bin/bash\n"})
    append_submission(run, Submission("77", "slurm", 0.0, "here"))
    for step in (5, 10):
        (run.checkpoints / f"checkpoint-{step}").mkdir()
        (run.checkpoints / f"checkpoint-{step}" / "MANIFEST.json").write_text("{}")
    return run


def read_all(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def resume(run: Run, *arguments: str) -> subprocess.CompletedProcess[str]:
    place = run.directory.parents[1]
    environment = {**os.environ, "LORA_JOBS_HOME": str(place / "runs"), "PATH": f"{place}/bin:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "lora_jobs", "resume", run.id, *arguments]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)


def test_refused_by_sbatch_nothing_has_changed(run: Run) -> None:
    before = read_all(run.directory)
    done = resume(run, "--from-scratch", "--set", "training.seed=7", "--allow-drift", "training.seed")
    assert (done.returncode, "sbatch refuses the job" in done.stderr) == (4, True), done.stderr
    assert read_all(run.directory) == before


def test_when_slurm_does_not_answer_nobody_resumes(run: Run) -> None:
    squeue = run.directory.parents[1] / "bin/squeue"
    squeue.write_text(
        "#!/bin/sh\n# A fake squeue, for tests.\necho 'Socket timed out on send/recv operation' >&2; exit 1\n"
    )
    before = read_all(run.directory)
    done = resume(run, "--from-scratch")
    assert (done.returncode, "can't tell whether old-1 still runs" in done.stderr) == (4, True), done.stderr
    assert read_all(run.directory) == before


def replace_fake(run: Run, name: str, body: str) -> None:
    path = run.directory.parents[1] / "bin" / name
    path.write_text(f"#!/bin/sh\n# A fake {name}, for tests.\n{body}\n")
    path.chmod(0o755)


def show_in_queue(run: Run, state: str) -> None:
    row = f"77|{state}|Priority|boost|me|acct|normal|100|2026-11-20T10:00:00|N/A|0:00|1:00:00|1|N/A|||(null)|old-1"
    replace_fake(run, "squeue", f"echo '{row}'")


def test_asking_twice_finds_the_job_that_waits(run: Run) -> None:
    show_in_queue(run, "PENDING")
    before = read_all(run.directory)
    done = resume(run)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "old-1 is on its way already: job 77 is PENDING")
    assert read_all(run.directory) == before


def test_while_the_job_runs_nobody_resumes(run: Run) -> None:
    show_in_queue(run, "RUNNING")
    done = resume(run)
    assert (done.returncode, "old-1 is still RUNNING as job 77" in done.stderr) == (5, True), done.stderr


def test_what_would_end_the_same_way_again_is_refused_unless_it_is_changed(run: Run) -> None:
    begin_attempt(run, job_id="77", restart_count=0, backend="slurm", host="n1", resume_from=None, first_step=0)
    end_attempt(
        run,
        job_id="77",
        restart_count=0,
        exit_code=1,
        state="FAILED",
        reason="torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 7.81 GiB",
        last_committed_step=None,
        cause="gpu_memory",
    )
    done = resume(run, "--from-scratch")
    assert done.returncode == 5
    assert "would end the same way again: the GPU ran out of memory (torch.OutOfMemoryError" in done.stderr
    done = resume(
        run, "--from-scratch", "--dry-run", "--set", "data.max_length=512", "--allow-drift", "data.max_length"
    )
    assert done.returncode == 0, done.stderr
    assert "cause    the GPU ran out of memory: lora-jobs check names what to lower" in done.stdout
    assert "memory   " in done.stdout


def test_a_job_that_slurm_still_knows_goes_back_under_its_id(run: Run) -> None:
    """The first resume writes the script anew, by sbatch; a second one, with nothing changed, requeues that job."""
    replace_fake(run, "sbatch", 'case " $* " in *" --test-only "*) exit 0;; esac; echo 78')
    replace_fake(run, "scontrol", 'echo "$*" >> "${0%/bin/*}/orders"')
    done = resume(run, "--from-scratch")
    assert done.returncode == 0, done.stderr
    orders = run.directory.parents[1] / "orders"
    assert not orders.exists()
    done = resume(run)
    assert done.returncode == 0, done.stderr
    assert orders.read_text() == "requeue 78\n"
    assert [job.job_id for job in load_submissions(run)] == ["77", "78", "78"]
    replace_fake(run, "scontrol", "echo 'Invalid job id specified' >&2; exit 1")
    replace_fake(run, "sbatch", 'case " $* " in *" --test-only "*) exit 0;; esac; echo 79')
    assert resume(run).returncode == 0
    assert load_submissions(run)[-1].job_id == "79"
