"""The client when Slurm is away, slow or talks nonsense: it says so and invents nothing. Fakes are programs on PATH."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_jobs.cluster.client import SubmissionTest, cancel_job, check_submission, requeue_job
from lora_jobs.cluster.observation import Observation, observe_jobs
from lora_jobs.errors import ClusterError, CommandError

RECORDED = Path(__file__).parents[2] / "slurm_output" / "22.05"


class FakeSlurm:
    """Programs that answer with a file and an exit status, and write down how they were called."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.calls = directory / "calls"
        self.calls.touch()

    def answers(self, name: str, stdout: str = "", stderr: str = "", status: int = 0) -> None:
        (self.directory / f"{name}.stdout").write_text(stdout)
        (self.directory / f"{name}.stderr").write_text(stderr)
        program = self.directory / name
        program.write_text(
            f'#!/bin/sh\necho "{name} $*" >> {self.calls}\n'
            f"while IFS= read -r line; do echo \"$line\"; done < {self.directory}/{name}.stdout\n"
            f"while IFS= read -r line; do echo \"$line\" >&2; done < {self.directory}/{name}.stderr\nexit {status}\n"
        )  # fmt: skip
        program.chmod(0o755)

    def called(self) -> list[str]:
        return [line.split()[0] for line in self.calls.read_text().splitlines()]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    monkeypatch.setenv("PATH", str(tmp_path))
    return FakeSlurm(tmp_path)


def load(name: str) -> str:
    """A recorded answer; squeue's with the two columns that were not yet asked for when it was recorded."""
    text = (RECORDED / f"{name}.txt").read_text()
    rows = [line.split("|", 15) for line in text.splitlines()] if name == "squeue" else []
    return "".join("|".join([*row[:15], "(null)|(null)", row[15]]) + "\n" for row in rows) or text


def look(ids: list[str]) -> Observation:
    return observe_jobs(ids, ranked=False)


def test_one_call_each_answers_for_all_ids(fake: FakeSlurm):
    fake.answers("squeue", load("squeue"))
    fake.answers("sprio", load("sprio").replace("2|10543", "15|10543").replace("3|10371", "16|10371"))
    fake.answers("sacct", "77|COMPLETED|0:0|None|p|u|a|q|1|2026-01-01T00:00:00|Unknown|Unknown|5|1:00|1|n|old\n")
    answers = look(["14", "15", "16_2", "77", "14", "not an id; rm -rf"])
    jobs = {job_id: sighting.job for job_id, sighting in answers.jobs.items()}
    assert {job_id: (job.state, job.source) for job_id, job in jobs.items()} == {
        "14": ("RUNNING", "squeue"),
        "15": ("PENDING", "squeue"),
        "16_2": ("PENDING", "squeue"),
        "77": ("COMPLETED", "sacct"),
    }
    assert {key: job.factors.priority for key, job in jobs.items() if job.factors} == {"15": 10543, "16_2": 10371}
    assert answers.notes == ()
    assert fake.called() == ["squeue", "sprio", "sacct"]


def test_no_question_without_ids(fake: FakeSlurm):
    assert look([]) == Observation()
    assert look(["../x"]) == Observation()
    assert fake.called() == []


def test_no_slurm_at_all(fake: FakeSlurm):
    assert look(["1"]) == Observation(
        history={"1": ()},
        notes=("queue not readable: squeue is not on PATH", "past jobs not readable: sacct is not on PATH"),
        queue_answered=False,
    )


def test_controller_and_database_down(fake: FakeSlurm):
    fake.answers("squeue", stderr=load("squeue_down"), status=1)
    fake.answers("sacct", stderr=load("sacct_down"), status=1)
    answers = look(["1"])
    assert answers.jobs == {}
    assert [note.partition(" (Slurm")[0] for note in answers.notes] == [
        "queue not readable: Slurm's controller can't be reached",
        "past jobs not readable: Slurm's accounting database can't be reached",
    ]


def test_controller_down_is_made_up_for_by_accounting(fake: FakeSlurm):
    fake.answers("squeue", stderr=load("squeue_down"), status=1)
    fake.answers("sacct", load("sacct"))
    answers = look(["14"])
    assert answers.jobs["14"].job.state == "RUNNING"
    assert len(answers.notes) == 1


def test_unreadable_priority_leaves_the_job(fake: FakeSlurm):
    fake.answers("squeue", load("squeue"))
    fake.answers("sprio", stderr="You are not running a supported priority plugin\n", status=1)
    answers = look(["15"])
    assert (answers.jobs["15"].job.priority, answers.jobs["15"].job.factors) == (5543, None)
    assert answers.notes == ("priority not readable: You are not running a supported priority plugin",)


def test_job_that_started_between_the_two_questions(fake: FakeSlurm):
    fake.answers("squeue", load("squeue"))
    fake.answers("sprio", load("sprio_unknown"))
    assert (look(["15"]).jobs["15"].job.factors, look(["15"]).notes) == (None, ())


def test_unknown_job_is_no_failure(fake: FakeSlurm):
    fake.answers("squeue", stderr=load("squeue_unknown"), status=1)
    fake.answers("sacct")
    assert look(["99999"]) == Observation(history={"99999": ()})


def test_accounting_that_lags_is_pointed_out(fake: FakeSlurm):
    fake.answers("squeue", stderr=load("squeue_unknown"), status=1)
    fake.answers("sacct", load("sacct"))
    assert look(["14"]).notes == ("job 14: accounting still says RUNNING, the queue no longer holds it",)


def test_last_attempt_of_a_requeued_job_counts(fake: FakeSlurm):
    fake.answers("squeue", stderr=load("squeue_unknown"), status=1)
    fake.answers("sacct", load("sacct_duplicates"))
    assert look(["12"]).jobs["12"].job.state == "COMPLETED"


def test_nonsense_is_quoted_in_a_note(fake: FakeSlurm):
    fake.answers("squeue", "<html>502</html>\n")
    fake.answers("sacct", "<html>503</html>\n")
    assert look(["1"]).notes == (
        "queue not readable: squeue answered something that is no list of jobs: '<html>502</html>'",
        "past jobs not readable: sacct answered something that is no list of jobs: '<html>503</html>'",
    )


def test_accepted_with_a_banner(fake: FakeSlurm):
    fake.answers("sbatch", "Welcome\n", load("test_only"))
    test = check_submission(Path("/x/script.sbatch"))
    assert (test.accepted, test.expected_start, test.hint) == (True, "2026-11-20T19:59:57", None)
    assert fake.calls.read_text() == "sbatch --test-only /x/script.sbatch\n"


def test_accepted_without_a_forecast(fake: FakeSlurm):
    fake.answers("sbatch")
    assert check_submission(Path("/x")) == SubmissionTest(True, None, "")


def test_refused(fake: FakeSlurm):
    fake.answers("sbatch", stderr=load("refused_account"), status=1)
    test = check_submission(Path("/x"))
    assert not test.accepted
    assert test.message == (
        "this account may not be used by you, or not in this partition "
        "(Slurm: Invalid account or account/partition combination specified)"
    )


def test_no_sbatch(fake: FakeSlurm):
    with pytest.raises(CommandError, match="sbatch is not on PATH"):
        check_submission(Path("/x"))


@pytest.mark.parametrize("job_id", ["", "-1", "1 2", "1;reboot", "--user=root", "../1"])
def test_only_job_ids_are_cancelled_or_requeued(fake: FakeSlurm, job_id: str):
    for order in (cancel_job, requeue_job):
        with pytest.raises(ClusterError, match="not a Slurm job id"):
            order(job_id)
    assert fake.called() == []


def test_refused_order(fake: FakeSlurm):
    fake.answers("scontrol", stderr=load("requeue_unknown"), status=1)
    with pytest.raises(ClusterError, match="job 5 can't be requeued: Slurm does not know this job any more"):
        requeue_job("5")
