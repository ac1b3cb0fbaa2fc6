"""What sbatch gets, what stays on disk, and what a refusal leaves. sbatch is a small program on PATH here."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from submitit.core.utils import DelayedSubmission

from lora_jobs.cluster.submission import submit_slurm
from lora_jobs.errors import OutputError, SubmissionError
from lora_jobs.training.entry import train

MakeRun = "Callable[..., ShellRun]"
RECORDED = Path(__file__).parents[2] / "slurm_output" / "22.05"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "programs"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))
    return directory


def write_sbatch(programs: Path, body: str) -> None:
    for name, text in (("sbatch", body), ("srun", "exit 1")):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)


def test_the_script_is_ours_and_submitit_finds_its_job(
    make_shell_run: MakeRun, programs: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_CONF", "/here/slurm.conf")
    write_sbatch(
        programs,
        f'echo "$# $1 $SLURM_CONF ${{SLURM_JOB_ID-none}}" > {programs}/call\n'
        f'while IFS= read -r line; do printf "%s\\n" "$line"; done < "$2" > {programs}/script\n'
        'echo "Budget left: 5 h"; echo "4711;leonardo"',
    )
    shell = make_shell_run(backend="slurm")
    before = time.time()
    submission = submit_slurm(shell.plan, shell.run)
    assert (submission.job_id, submission.backend) == ("4711", "slurm")
    assert before <= submission.submitted_at <= time.time()
    assert (programs / "call").read_text() == "2 --parsable /here/slurm.conf none\n"
    assert (programs / "script").read_text() == shell.plan.script
    assert (shell.run.submitit / "4711_submission.sh").read_text() == shell.run.script_path.read_text()
    assert {path.name for path in shell.run.submitit.iterdir()} == {"4711_submission.sh", "4711_submitted.pkl"}
    delayed = DelayedSubmission.load(shell.run.submitit / "4711_submitted.pkl")
    assert (delayed.function, delayed.args) == (train, (str(shell.run.directory),))
    assert delayed._timeout_min == 10, "update_parameters was called: submitit's default is 5 minutes"


def test_a_refusal_leaves_nothing(make_shell_run: MakeRun, programs: Path):
    shutil.copy(RECORDED / "refused_submit_limit.txt", programs / "words")
    write_sbatch(programs, f'while IFS= read -r line; do echo "$line" >&2; done < {programs}/words; exit 1')
    shell = make_shell_run(backend="slurm")
    with pytest.raises(SubmissionError, match="sbatch refuses the job: you have as many jobs queued") as caught:
        submit_slurm(shell.plan, shell.run)
    assert "wait for one to end" in (caught.value.hint or "")
    assert list(shell.run.submitit.iterdir()) == []


def test_no_job_id(make_shell_run: MakeRun, programs: Path):
    write_sbatch(programs, "echo Queued.")
    shell = make_shell_run(backend="slurm")
    with pytest.raises(OutputError, match=r"gave no job id: 'Queued\.'"):
        submit_slurm(shell.plan, shell.run)


def test_no_slurm(make_shell_run: MakeRun, programs: Path):
    shell = make_shell_run(backend="slurm")
    with pytest.raises(SubmissionError, match="not on PATH") as caught:
        submit_slurm(shell.plan, shell.run)
    assert "--cluster local" in (caught.value.hint or "")
    assert not shell.run.submitit.exists()
