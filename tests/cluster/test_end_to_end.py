"""One YAML file to a finished adapter on a real Slurm: two nodes, ZeRO-2 over gloo, and everything that stops a job."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from slurm_cluster import ACCOUNT

from lora_jobs.checkpoints import list_checkpoints, verify_checkpoint
from lora_jobs.cluster.client import cancel_job
from lora_jobs.cluster.observation import observe_jobs
from lora_jobs.errors import ClusterError, SpecError
from lora_jobs.runs import find_run, find_runs_root, list_runs, load_attempts, load_metrics, load_submissions
from lora_jobs.workflows.observing import observe_runs
from lora_jobs.workflows.resuming import plan_resume, resume_run
from lora_jobs.workflows.submitting import submit_job

if TYPE_CHECKING:
    from collections.abc import Callable

    from slurm_cluster import SlurmCluster

    from lora_jobs.runs import Attempt, Run
    from lora_jobs.workflows.observing import RunStatus

pytestmark = [pytest.mark.slurm, pytest.mark.train]

SPEC = Path(__file__).parents[2] / "jobs" / "tiny_gemma2.yaml"
STEPS = 60
RUN_SECONDS = 400.0
ENVIRONMENT = Path(__file__).with_name("test_cluster.yaml")


@dataclass(frozen=True)
class Tiny:
    """The tiny model and its data, and the environment file of the test cluster."""

    directory: Path

    def overrides(self, *more: str) -> list[str]:
        return [
            f"model.name_or_path={json.dumps(f'{self.directory}/models/tiny_gemma2')}",
            f"data.train={json.dumps(f'{self.directory}/data/tiny/prompt.jsonl')}",
            f"resources.cluster={json.dumps(f'{self.directory}/test_cluster.yaml')}",
            f"resources.account={ACCOUNT}",
            "resources.nodes=2",
            "resources.gpus_per_node=1",
            f"training.max_steps={STEPS}",
            "training.save_steps=5",
            *more,
        ]


@pytest.fixture(scope="module")
def tiny(tiny_files: Path) -> Tiny:
    return Tiny(tiny_files)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Jobs start in an empty directory, runs go to another."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("LORA_JOBS_HOME", str(tmp_path / "runs"))
    return tmp_path / "runs"


def submit(tiny: Tiny, *more: str) -> Run:
    report = submit_job(SPEC, tiny.overrides(*more), cluster="slurm")
    assert report.run is not None
    return report.run


def wait_for(run: Run, ready: Callable[[RunStatus], bool], seconds: float = RUN_SECONDS) -> RunStatus:
    deadline = time.monotonic() + seconds
    while not ready(status := observe_runs([run]).runs[0]):
        assert time.monotonic() < deadline, f"{status}\n{read_logs(run)}"
        time.sleep(0.25)
    return status


def wait_for_end(run: Run) -> RunStatus:
    """The status once nothing more will happen by itself."""
    status = wait_for(run, lambda status: not status.active)
    assert status.state == "COMPLETED", f"{status}\n{load_attempts(run)}\n{read_logs(run)}"
    return status


def wait_for_step(run: Run, step: int) -> None:
    wait_for(run, lambda status: (status.last_committed_step or 0) >= step)


def read_logs(run: Run) -> str:
    return "\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in sorted(run.logs.iterdir()))


def hash_adapter(run: Run) -> str:
    assert verify_checkpoint(run.adapter).good
    return hashlib.sha256((run.adapter / "adapter_model.safetensors").read_bytes()).hexdigest()


def summarize(attempts: list[Attempt]) -> list[tuple[str, str, int, int]]:
    return [(attempt.state, attempt.job_id, attempt.restart_count, attempt.number) for attempt in attempts]


def losses(run: Run) -> dict[int, float]:
    """Loss by step; of a step that was trained twice, the later."""
    return {row["step"]: row["loss"] for row in load_metrics(run) if row["kind"] == "train"}


@dataclass(frozen=True)
class Reference:
    """What an uninterrupted run of the same spec ends with."""

    adapter: str
    losses: dict[int, float]


REFERENCE: list[Reference] = []


def find_reference(tiny: Tiny) -> Reference:
    """Trained once, by whichever test comes first."""
    if not REFERENCE:
        run = submit(tiny)
        wait_for_end(run)
        REFERENCE.append(Reference(hash_adapter(run), losses(run)))
    return REFERENCE[0]


def test_two_nodes_to_a_finished_adapter(slurm: SlurmCluster, tiny: Tiny, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_neverWrittenAnywhere")
    run = submit(tiny)
    job_id = observe_runs([run]).runs[0].job_id
    assert job_id is not None
    wait_for(run, lambda status: status.state == "RUNNING")
    nodes = observe_jobs([job_id], ranked=False).jobs[job_id].job.node_list
    status = wait_for_end(run)
    assert nodes == "lrdn[0001-0002]"
    assert (status.step, status.total_steps, status.attempts) == (STEPS, STEPS, 1)
    assert summarize(load_attempts(run)) == [("COMPLETED", job_id, 0, 1)]
    assert [path.name for path in list_checkpoints(run.checkpoints)][:1] == [f"checkpoint-{STEPS}"]
    seen = losses(run)
    assert list(seen) == list(range(1, STEPS + 1))
    assert seen[STEPS] < seen[1] - 0.5, "it learned"
    assert find_run(job_id, find_runs_root()) == run
    assert (run.submitit / f"{job_id}_submission.sh").read_text() == run.script_path.read_text()
    REFERENCE.append(Reference(hash_adapter(run), seen))
    files = [path for path in run.directory.rglob("*") if path.is_file()]
    assert [path for path in files if b"hf_neverWrittenAnywhere" in path.read_bytes()] == []


def test_signal_saves_requeues_and_ends_with_the_same_adapter(slurm: SlurmCluster, tiny: Tiny):
    reference = find_reference(tiny)
    run = submit(tiny)
    wait_for_step(run, 5)
    job_id = observe_runs([run]).runs[0].job_id or ""
    cancel_job(job_id, "USR2")
    wait_for_end(run)
    first, second = load_attempts(run)
    assert summarize([first, second]) == [("SAVED", job_id, 0, 1), ("COMPLETED", job_id, 1, 2)]
    assert second.first_step == first.last_committed_step != 0
    assert second.resume_from == f"checkpoint-{first.last_committed_step}"
    assert hash_adapter(run) == reference.adapter
    assert losses(run) == reference.losses


def test_preemption_loses_no_committed_step_and_comes_back_by_itself(slurm: SlurmCluster, tiny: Tiny, tmp_path: Path):
    reference = find_reference(tiny)
    run = submit(tiny)
    wait_for_step(run, 5)
    urgent = slurm.call(
        "sbatch", "--parsable", "--partition=boost_urgent", "--nodes=2", "--gpus-per-node=4", "--time=1",
        f"--output={tmp_path}/urgent.out", "--wrap=sleep 3",
    ).stdout.strip()  # fmt: skip
    wait_for(run, lambda _: observe_jobs([urgent], ranked=False).jobs[urgent].job.state == "COMPLETED")
    job_id = observe_runs([run]).runs[0].job_id or ""
    wait_for_end(run)
    first, second = load_attempts(run)
    assert summarize([first, second]) == [("SAVED", job_id, 0, 1), ("COMPLETED", job_id, 1, 2)]
    trained = max(row["step"] for row in load_metrics(run) if row["kind"] == "train" and row["attempt"] == 1)
    assert second.first_step == first.last_committed_step == trained, "saved in the grace time: no step is lost at all"
    assert hash_adapter(run) == reference.adapter


def test_a_lost_node_costs_only_what_was_not_committed(slurm: SlurmCluster, tiny: Tiny):
    """Slurm itself requeues the job; whether its ranks could still save is a matter of luck."""
    reference = find_reference(tiny)
    run = submit(tiny)
    wait_for_step(run, 5)
    job_id = observe_runs([run]).runs[0].job_id or ""
    slurm.call("scontrol", "update", "NodeName=lrdn0002", "State=DOWN", "Reason=test")
    slurm.call("scontrol", "update", "NodeName=lrdn0002", "State=RESUME", check=False)  # it may be back by itself
    wait_for_end(run)
    first, *_, last = load_attempts(run)
    assert (last.state, last.job_id) == ("COMPLETED", job_id)
    assert last.restart_count > first.restart_count
    assert last.first_step >= 5, first
    assert hash_adapter(run) == reference.adapter


def test_a_signal_before_training_begins_does_not_end_the_job(slurm: SlurmCluster, tiny: Tiny):
    """Preemption may come while Python still starts and nobody can save: the job must not be left as failed."""
    run = submit(tiny, "training.max_steps=4")
    job_id = observe_runs([run]).runs[0].job_id or ""
    wait_for(run, lambda _: (run.logs / "attempt-1.out").exists())
    cancel_job(job_id, "TERM")
    wait_for_end(run)


def test_time_limit_signal_saves_and_requeues(slurm: SlurmCluster, tiny: Tiny):
    endless = "training.max_steps=100000", "training.save_steps=1000"
    # Slurm looks at time limits every 30 s: this signal comes 60 to 90 s before the end, 90 to 120 s after the start.
    run = submit(tiny, *endless, "resources.time='00:03:00'", "resume.signal_seconds=60")
    job_id = observe_runs([run]).runs[0].job_id or ""
    wait_for(run, lambda status: status.attempts == 2)
    cancel_job(job_id)
    first = load_attempts(run)[0]
    assert (first.state, first.reason, first.restart_count) == ("SAVED", "saved after SIGUSR2", 0)
    assert (first.last_committed_step or 0) > 0
    assert load_attempts(run)[1].first_step == first.last_committed_step


def test_cancelled_job_stays_cancelled_and_resume_goes_on(slurm: SlurmCluster, tiny: Tiny):
    """Plain scancel: the ranks save, the job does not come back; `resume` requeues it while Slurm knows it."""
    reference = find_reference(tiny)
    run = submit(tiny)
    wait_for_step(run, 5)
    first_id = observe_runs([run]).runs[0].job_id or ""
    cancel_job(first_id)
    # Idle nodes: the batch script, which alone could requeue the job, has ended too.
    wait_for(run, lambda status: not status.active and slurm.is_idle())
    assert observe_jobs([first_id], ranked=False).jobs[first_id].job.state == "CANCELLED"
    status = observe_runs([run]).runs[0]
    assert (status.state, status.job_id, status.attempts) == ("CANCELLED", first_id, 1), read_logs(run)
    plan = plan_resume(first_id)
    assert plan.chosen is not None
    assert plan.step >= 5
    resume_run(plan)
    again = plan_resume(first_id)
    assert (again.pending, again.status.job_id) == (True, first_id)
    wait_for_end(run)
    first, second = load_attempts(run)
    assert [(attempt.job_id, attempt.restart_count) for attempt in (first, second)] == [(first_id, 0), (first_id, 1)]
    assert [job.after_attempt for job in load_submissions(run)] == [0, 1]
    assert (second.resume_from, second.state) == (plan.chosen.name, "COMPLETED")
    assert hash_adapter(run) == reference.adapter


def test_hostile_names_never_run(slurm: SlurmCluster, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Shell code in every place that takes free text; the job trains as if the names were plain."""
    hostile = "a $(touch PWNED1) `touch PWNED2` 'q' ; touch PWNED3 & # %n"
    directory = tmp_path / hostile
    directory.mkdir()
    (directory / "models").symlink_to(tiny.directory / "models")
    (directory / "data").symlink_to(tiny.directory / "data")
    text = f"{ENVIRONMENT.read_text()}  HARMLESS: {json.dumps(hostile)}\n"
    (directory / "test_cluster.yaml").write_text(text)
    monkeypatch.setenv("LORA_JOBS_HOME", str(directory / "runs"))
    run = submit(Tiny(directory), "training.max_steps=2")
    wait_for_end(run)
    assert run.directory == directory / "runs" / "tiny_gemma2-1"
    assert [path for path in tmp_path.rglob("*") if "PWNED" in path.name and path != directory] == []
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(
    "override",
    [
        'name="x\\necho INJECTED"',
        "name=../../x",
        "name='x;touch PWNED'",
        'resources.account="a\\n#SBATCH --uid=0"',
        "resources.partition='p $(touch PWNED)'",
        "resources.qos='q\"'",
        "resources.constraint='a$(touch PWNED)'",
        'model.name_or_path="m\\ntouch PWNED"',
    ],
)
def test_hostile_words_are_refused(slurm: SlurmCluster, tiny: Tiny, home: Path, tmp_path: Path, override: str):
    with pytest.raises(SpecError):
        submit_job(SPEC, tiny.overrides(override), cluster="slurm")
    assert not home.exists() or list_runs(home) == []
    assert slurm.call("squeue", "-h").stdout == ""
    assert list((tmp_path / "work").iterdir()) == []


def test_a_refused_job_leaves_nothing(slurm: SlurmCluster, tiny: Tiny, home: Path):
    with pytest.raises(ClusterError, match="this account may not be used by you") as caught:
        submit_job(SPEC, tiny.overrides("resources.account=nobody"), cluster="slurm")
    assert "resources.account" in (caught.value.hint or "")
    assert not home.exists() or list(home.iterdir()) == []
    assert slurm.call("squeue", "-h").stdout == ""
