"""status and why against a real Slurm: ranks, factors, starts and reasons are those of squeue and sprio."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from slurm_cluster import ACCOUNT, wait_until
from typer.testing import CliRunner

from lora_jobs.cli.main import app
from lora_jobs.cluster.observation import observe_jobs
from lora_jobs.runs import Run, Submission, append_submission, create_run
from lora_jobs.workflows.detailing import describe_run
from lora_jobs.workflows.diagnosing import diagnose
from lora_jobs.workflows.explaining import Explanation, explain_job
from lora_jobs.workflows.observing import find_status
from lora_jobs.workflows.planning import plan_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from slurm_cluster import SlurmCluster

    from lora_jobs.cluster.observation import Observation
    from lora_jobs.workflows.observing import RunStatus

pytestmark = pytest.mark.slurm

ALL_GPUS = ("--nodes=2", "--gpus-per-node=4", "--time=00:30:00")
ONE_GPU = ("--nodes=1", "--gpus-per-node=1", "--time=00:10:00")
OTHER_USER = "daemon"
ENVIRONMENT = Path(__file__).with_name("test_cluster.yaml").read_text()
SPEC = f"""
name: planned
model: {{{{name_or_path: google/gemma-3-270m-it, dtype: bfloat16}}}}
lora: {{{{r: 8}}}}
data: {{{{train: "{{data}}", format: text, max_length: 256}}}}
training: {{{{max_steps: 50, bf16: true, gradient_accumulation_steps: 8}}}}
resources:
  {{{{cluster: "{{cluster}}", partition: boost_usr_prod, account: {ACCOUNT}, cpus_per_task: 2, time: "00:20:00"}}}}
"""
AREAS = {"slurm", "accounts"}
FILES = {"spec.yaml": "name: a\n", "script.sbatch": "#SBATCH --time=00:10:00\n"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_JOBS_HOME", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def other_user(slurm_session: SlurmCluster) -> str:
    """A second user with the same account, and a QOS that runs one job of a user at a time."""
    call = slurm_session.call
    call("sacctmgr", "-i", "add", "user", OTHER_USER, f"account={ACCOUNT}", check=False)
    call("sacctmgr", "-i", "add", "qos", "one_at_a_time", "set", "MaxJobsPerUser=1", check=False)
    call("sacctmgr", "-i", "modify", "user", "root", "set", "qos+=one_at_a_time")
    return OTHER_USER


class Desk:
    """Submits plain jobs, each as the only submission of a run."""

    def __init__(self, slurm: SlurmCluster, home: Path, scratch: Path) -> None:
        self.slurm, self.home, self.scratch = slurm, home, scratch
        self.count = 0

    def submit(self, *options: str, body: str = "sleep 300") -> str:
        script = self.scratch / "job.sh"
        script.write_text(f"#!/bin/bash\n{body}\n")
        argv = ["sbatch", "--parsable", f"--output={self.scratch}/%j.out", *options, str(script)]
        return self.slurm.call(*argv).stdout.strip()

    def run(self, *options: str, body: str = "sleep 300") -> tuple[str, Run]:
        job_id = self.submit(*options, body=body)
        self.count += 1
        run = create_run(self.home, f"a-{self.count}", FILES)
        append_submission(run, Submission(job_id, "slurm", time.time(), "here"))
        return job_id, run

    def fill(self) -> str:
        job_id = self.submit(*ALL_GPUS)
        self.wait(lambda: self.reason(job_id)[0] == "RUNNING", "the job that fills the partition")
        return job_id

    def reason(self, job_id: str) -> tuple[str, str]:
        state, _, reason = self.slurm.call("squeue", "-h", "-j", job_id, "-o", "%T|%r").stdout.strip().partition("|")
        return state, reason

    def wait(self, ready: Callable[[], bool], what: str, seconds: float = 120) -> None:
        wait_until(ready, what, self.slurm.root, seconds)

    def why(self, job_id: str, code: str) -> Explanation:
        """The explanation, once squeue gives a reason that begins so."""
        self.wait(lambda: self.reason(job_id)[1].startswith(code), f"{code} of {job_id}")
        return explain_job(job_id)


@pytest.fixture
def desk(slurm: SlurmCluster, home: Path, tmp_path: Path, other_user: str) -> Desk:
    return Desk(slurm, home, tmp_path)


def read_squeue(slurm: SlurmCluster) -> dict[str, tuple[str, int, str]]:
    """Pending jobs and tasks of the partition as squeue prints them: user, priority, expected start."""
    argv = ["squeue", "-h", "-r", "-t", "PD", "-p", "boost_usr_prod", "-o", "%i|%u|%Q|%S"]
    rows = [line.split("|") for line in slurm.call(*argv).stdout.splitlines()]
    return {job_id: (user, int(priority), start) for job_id, user, priority, start in rows}


def read_sprio(slurm: SlurmCluster) -> dict[str, list[str]]:
    rows = slurm.call("sprio", "-h", "-o", "%i|%Y|%A|%F|%J|%P|%Q|%S|%N|%B|%T").stdout.splitlines()
    return {row.split("|")[0]: row.split("|")[1:] for row in rows}


@pytest.fixture
def all_weighted(slurm: SlurmCluster) -> Iterator[None]:
    """Weights for what this cluster gives no points for: accounts, and the resources that a job asks for."""
    before = slurm.slurm_conf.read_text()
    slurm.slurm_conf.write_text(f"{before}PriorityWeightAssoc=300\nPriorityWeightTRES=cpu=100,gres/gpu=700\n")
    modify = ("sacctmgr", "-i", "modify", "user", "root", f"account={ACCOUNT}", "set")
    try:
        slurm.call("scontrol", "reconfigure")
        slurm.call(*modify, "Priority=5")
        yield
    finally:
        slurm.call(*modify, "Priority=-1")
        slurm.slurm_conf.write_text(before)
        slurm.call("scontrol", "reconfigure")


def test_rank_priority_factors_and_start_equal_what_slurm_prints(desk: Desk, all_weighted: None):
    desk.fill()
    desk.submit(*ONE_GPU, "--array=0-6%2")
    desk.submit(*ONE_GPU, f"--uid={OTHER_USER}", f"--account={ACCOUNT}", "--chdir=/")
    desk.submit(*ONE_GPU, "--qos=boost_qos_dbg")
    desk.submit(*ONE_GPU, "--hold")
    mine = [desk.run(*ONE_GPU, f"--nice={nice}")[0] for nice in (0, 50, 200)]
    mine.append(desk.run(*ALL_GPUS, "--qos=boost_qos_dbg")[0])
    desk.wait(lambda: read_squeue(desk.slurm)[mine[0]][2] != "N/A", "an expected start")
    for _ in range(10):  # the priority ages and the forecast moves: what was the same before and after is compared
        before = read_squeue(desk.slurm), read_sprio(desk.slurm)
        report = find_status()
        if (read_squeue(desk.slurm), read_sprio(desk.slurm)) == before:
            break
        time.sleep(0.5)
    queue, priorities = before
    assert report.notes == ()
    assert len(queue) == 7 + 1 + 1 + 1 + 4
    seen = {row.job_id: row for row in report.runs}
    assert {job_id: (row.rank, row.pending_jobs, row.priority) for job_id, row in seen.items()} == {
        job_id: (sum(other[1] > queue[job_id][1] for other in queue.values()) + 1, len(queue), queue[job_id][1])
        for job_id in mine
    }
    assert len({row.rank for row in seen.values()}) == 4
    starts = {job_id: row.expected_start or "N/A" for job_id, row in seen.items()}
    assert starts == {job_id: queue[job_id][2] for job_id in mine}
    names = ("priority", "age", "fairshare", "job_size", "partition", "qos", "site", "nice", "association")
    factors = {job_id: row.factors or {} for job_id, row in seen.items()}
    printed = {job_id: [str(parts[name]) for name in names] for job_id, parts in factors.items()}
    assert printed == {job_id: priorities[job_id][:-1] for job_id in mine}
    tres = {job_id: re.findall(r"=(\d+)", priorities[job_id][-1]) for job_id in mine}
    assert {job_id: parts["tres"] for job_id, parts in factors.items()} == {
        job_id: sum(map(int, points)) for job_id, points in tres.items()
    }
    assert all(parts["association"] and parts["tres"] for parts in factors.values())
    sums = {job_id: sum(parts.values()) - parts["priority"] - 2 * parts["nice"] for job_id, parts in factors.items()}
    apart = {job_id: abs(parts["priority"] - sums[job_id]) for job_id, parts in factors.items()}
    assert max(apart.values()) <= 10, "no part is missing: each is rounded for itself"
    lines = run_cli("status").stdout.splitlines()
    assert len(lines) == 5
    assert max(len(line) for line in lines) <= 100
    assert f"{seen[mine[2]].rank} of {len(queue)} pending, " in lines[2]
    assert lines[2].endswith(f"others go first, prio {seen[mine[2]].priority}")


def test_the_page_and_why_show_weights_and_who_is_ahead(desk: Desk):
    desk.fill()
    desk.submit(*ALL_GPUS, "--qos=boost_qos_dbg")
    job_id, run = desk.run(*ONE_GPU)
    answer = desk.why(job_id, "Priority")
    numbers = dict(answer.numbers)
    assert answer.rank == 2
    assert numbers["rank"] == "2 of 2 pending in boost_usr_prod"
    assert numbers["ahead"] == "1 job of 1 user, 1 of them yours: 2 nodes, 8 GPUs, 4 GPU-hours at most"
    assert numbers["time limit"] == "1-00:00:00 allowed, 00:10:00 asked for"
    assert "(of 2 in boost_usr_prod, up)" in numbers["nodes"]
    weights = {row.name: row.weight for row in describe_run(run.id).factors}
    assert {name: weights[name] for name in ("age", "fair-share", "size", "partition", "QOS")} == {
        "age": 1000, "fair-share": 10000, "size": 1000, "partition": 2000, "QOS": 4000,
    }  # fmt: skip
    shown = run_cli("why", job_id).stdout
    assert "served first" in shown
    assert run_cli("status", run.id).stdout.count("fair-share") == 1


def test_reasons_of_hold_and_dependency(desk: Desk):
    running = desk.fill()
    held, _ = desk.run(*ONE_GPU)
    desk.slurm.call("scontrol", "hold", held)
    answer = desk.why(held, "JobHeld")
    assert (answer.reason, answer.rank) in {("JobHeldUser", None), ("JobHeldAdmin", None)}, "root's hold is either"
    assert answer.meaning.startswith("held by")
    user_held = desk.submit(*ONE_GPU, "--hold")
    answer = desk.why(user_held, "JobHeldUser")
    assert answer.actions == (f"`scontrol release {user_held}` lets it go on",)
    waiting, _ = desk.run(*ONE_GPU, f"--dependency=afterok:{running}")
    answer = desk.why(waiting, "Dependency")
    assert dict(answer.numbers)["waits for"].startswith(f"afterok:{running}")
    assert "waits for another job to end" in answer.meaning
    desk.slurm.call("scancel", running)
    answer = desk.why(waiting, "DependencyNeverSatisfied")
    assert answer.turn == "you"


def test_reason_of_a_limit_of_the_qos(desk: Desk):
    first = desk.submit(*ONE_GPU, "--qos=one_at_a_time")
    desk.wait(lambda: desk.reason(first)[0] == "RUNNING", "the first job")
    second, _ = desk.run(*ONE_GPU, "--qos=one_at_a_time")
    answer = desk.why(second, "QOSMaxJobsPerUserLimit")
    assert answer.meaning == "as many jobs run as its QOS allows"
    assert "MaxJobsPU 1" in dict(answer.numbers)["QOS one_at_a_time"]
    assert find_status().runs[0].reason_text == "QOS: running jobs at a limit"


def test_reason_of_a_limit_of_the_partitions_qos(desk: Desk):
    update = ("scontrol", "update", "PartitionName=boost_urgent")
    desk.slurm.call(*update, "QoS=one_at_a_time")
    try:
        first = desk.submit(*ONE_GPU, "--partition=boost_urgent")
        desk.wait(lambda: desk.reason(first)[0] == "RUNNING", "the first job")
        second, _ = desk.run(*ONE_GPU, "--partition=boost_urgent")
        answer = desk.why(second, "QOSMaxJobsPerUserLimit")
        numbers = dict(answer.numbers)
        assert (numbers["QOS normal"], answer.notes) == ("no limits of its own", ())
        assert numbers["QOS one_at_a_time"] == "MaxJobsPU 1, of the partition"
    finally:
        desk.slurm.call("scancel", "--user=root", check=False)
        desk.slurm.call(*update, "QoS=")


def test_reason_of_a_limit_of_the_account(desk: Desk):
    modify = ("sacctmgr", "-i", "modify", "account", ACCOUNT, "set")
    desk.slurm.call(*modify, "GrpJobs=1")
    try:
        first = desk.submit(*ONE_GPU)
        desk.wait(lambda: desk.reason(first)[0] == "RUNNING", "the first job")
        second, _ = desk.run(*ONE_GPU)
        answer = desk.why(second, "AssocGrpJobsLimit")
        assert answer.meaning == "as many jobs run as your account allows"
        assert dict(answer.numbers)["account limit"] == f"{ACCOUNT.lower()}: GrpJobs 1"
        assert answer.notes == ()
    finally:
        desk.slurm.call(*modify, "GrpJobs=-1")


def test_reason_of_a_drained_node(desk: Desk):
    desk.slurm.call("scontrol", "update", "NodeName=lrdn0002", "State=DRAIN", "Reason=broken | fan")
    try:
        job_id, _ = desk.run(*ONE_GPU, "--nodelist=lrdn0002")
        answer = desk.why(job_id, "ReqNodeNotAvail")
        assert answer.meaning == "nodes that it needs are down, drained, reserved or kept for maintenance"
        numbers = dict(answer.numbers)
        assert numbers["nodes away"] == "lrdn0002 drained: broken | fan"
        assert numbers["nodes"] == "1 drained, 1 idle (of 2 in boost_usr_prod, up)"
        assert find_status().runs[0].reason_text == "nodes down, drained or reserved"
    finally:
        desk.slurm.call("scontrol", "update", "NodeName=lrdn0002", "State=RESUME")


def test_a_requeued_job_rests_and_every_start_is_shown(desk: Desk):
    job_id, run = desk.run(*ONE_GPU, "--requeue", body="[[ -n ${SLURM_RESTART_COUNT:-} ]] && exit 3; sleep 300")
    desk.wait(lambda: desk.reason(job_id)[0] == "RUNNING", "the first start")
    desk.slurm.call("scontrol", "requeue", job_id)
    desk.wait(lambda: desk.reason(job_id)[1] == "BeginTime", "the rest after the requeue")
    answer = explain_job(job_id)
    assert answer.reason == "BeginTime"
    assert "requeued" in answer.meaning
    desk.wait(lambda: find_row(run).state == "FAILED", "the second start")
    desk.wait(lambda: len(describe_run(job_id).starts) == 2, "both starts in accounting")
    page = describe_run(job_id)
    assert [(start.job_id, start.state) for start in page.starts] == [(job_id, "REQUEUED"), (job_id, "FAILED")]
    assert find_row(run).next_step == f"lora-jobs resume {job_id}"


def test_a_reservation_that_keeps_the_nodes_is_named(desk: Desk):
    create = ("scontrol", "create", "reservation", "ReservationName=kept", "StartTime=now", "Duration=60")
    desk.slurm.call(*create, "Nodes=lrdn0002", f"Users={OTHER_USER}", "Flags=IGNORE_JOBS")
    try:
        job_id, _ = desk.run(*ONE_GPU, "--nodelist=lrdn0002")
        desk.wait(lambda: desk.reason(job_id)[1] not in ("", "None"), "a reason")
        numbers = dict(explain_job(job_id).numbers)
        assert numbers["reserved"].startswith("kept: lrdn0002, from 20"), numbers
        assert "ACTIVE" in numbers["reserved"]
        elsewhere, _ = desk.run(*ONE_GPU, "--partition=lrd_all_serial", "--gpus-per-node=0", "--hold")
        assert "reserved" not in dict(explain_job(elsewhere).numbers), "big0001 is not kept"
    finally:
        desk.slurm.call("scancel", "--user=root", check=False)
        desk.slurm.call("scontrol", "delete", "ReservationName=kept")


class Front:
    """A directory on PATH before the real Slurm, for one fake command at a time."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def put(self, name: str, body: str) -> None:
        for path in self.directory.iterdir():
            path.unlink()
        program = self.directory / name
        program.write_text(f"#!/bin/sh\n# A fake that stands before the real {name}.\n{body}\n")
        program.chmod(0o755)


BROKEN = {
    "fails": ('echo "this is a fake: out of order" >&2; exit 1', "this is a fake: out of order"),
    "hangs": ("exec sleep 60", "did not answer within 3 s"),
}
NOTES = {"squeue": "queue", "sprio": "priority", "sacct": "past jobs", "sinfo": "nodes"}


@pytest.mark.parametrize("how", BROKEN)
def test_one_command_that_is_broken_costs_its_column_only(
    how: str, desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    body, words = BROKEN[how]
    desk.fill()
    waiting, run = desk.run(*ONE_GPU)
    desk.why(waiting, "Resources")
    forgotten = create_run(desk.home, "old-1", FILES)
    append_submission(forgotten, Submission("4000000", "slurm", 1.0, "here"))
    desk.wait(
        lambda: desk.slurm.call("sacct", "-nXj", waiting, "-o", "state").stdout.strip() == "PENDING", "accounting"
    )
    front = Front(tmp_path / "front")
    front.directory.mkdir()
    monkeypatch.setenv("PATH", f"{front.directory}:{os.environ['PATH']}")
    monkeypatch.setenv("LORA_JOBS_QUERY_SECONDS", "3" if how == "hangs" else "60")
    for name, what in NOTES.items():
        front.put(name, body)
        note = f"{what} not readable: "
        if name != "sinfo":
            report = json.loads(run_cli("status", "--json").stdout)
            rows = {row["run"]: row for row in report["runs"]}
            assert [text for text in report["notes"] if text.startswith(note) and words in text], report["notes"]
            assert rows[run.id]["state"] == "PENDING", "squeue's, or accounting's where squeue is broken"
            assert (rows[run.id]["rank"] is None) == (name == "squeue")
            assert (rows[run.id]["factors"] is None) == (name in {"squeue", "sprio"})
            assert rows[forgotten.id]["state"] == ("UNREACHABLE" if name == "squeue" else "UNKNOWN")
        job = forgotten.id if name == "sacct" else waiting
        answer = json.loads(run_cli("why", job, "--json").stdout)
        assert [text for text in answer["notes"] if text.startswith(note) and words in text], answer["notes"]
        assert answer["actions"]
        if name in {"sprio", "sinfo"}:
            numbers = {row["what"] for row in answer["numbers"]}
            assert (answer["reason"], answer["rank"]) == ("Resources", 1)
            assert (bool(answer["factors"]), "nodes" in numbers) == (name == "sinfo", name == "sprio")


def find_row(run: Run) -> RunStatus:
    return next(row for row in find_status().runs if row.run == run.id)


@contextlib.contextmanager
def reconfigured(slurm: SlurmCluster, *changes: tuple[str, str]) -> Iterator[None]:
    """The same cluster under another slurm.conf: its controller is started anew, and again afterwards."""
    before = slurm.slurm_conf.read_text()
    text = before
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    try:
        restart(slurm, text)
        yield
    finally:
        slurm.call("scancel", "--user=root", check=False)
        slurm.call("scancel", f"--user={OTHER_USER}", check=False)
        wait_until(slurm.is_idle, "idle nodes", slurm.root)
        restart(slurm, before)


def restart(slurm: SlurmCluster, text: str) -> None:
    slurm.stop_process("slurmctld")
    slurm.slurm_conf.write_text(text)
    slurm.start_process("slurmctld", "slurmctld", "-D", "-f", str(slurm.slurm_conf))
    wait_until(slurm.is_idle, "the nodes", slurm.root)


def test_without_multifactor_there_are_no_factors(desk: Desk):
    with reconfigured(desk.slurm, ("PriorityType=priority/multifactor", "PriorityType=priority/basic")):
        desk.fill()
        job_id, run = desk.run(*ONE_GPU)
        desk.wait(lambda: desk.reason(job_id)[1] == "Resources", "a reason")
        report = find_status()
        assert report.notes == ("no priority factors: this cluster has priority/basic, first come first served",)
        row = report.runs[0]
        assert (row.rank, row.pending_jobs, row.factors) == (1, 1, None)
        assert row.priority == read_squeue(desk.slurm)[job_id][1]
        assert describe_run(run.id).factors == ()
        answer = explain_job(job_id)
        assert (answer.reason, answer.rank, answer.factors, answer.notes) == ("Resources", 1, (), report.notes)
        levels, starts = look_further(desk.scratch)
        assert levels["priority"] == ("warning", "priority/basic: no factors to show")
        assert None not in starts


def look_further(directory: Path) -> tuple[dict[str, tuple[str, str]], list[str | None]]:
    """What doctor says of Slurm (level and words by name), and the starts that plan got."""
    cluster = directory / "test_cluster.yaml"
    cluster.write_text(ENVIRONMENT)
    data = directory / "train.jsonl"
    data.write_text('{"text": "some words to learn"}\n' * 50)
    spec = directory / "job.yaml"
    spec.write_text(SPEC.format(data=data, cluster=cluster))
    found = diagnose(str(cluster)).findings
    levels = {finding.name: (finding.level, finding.message) for finding in found if finding.area in AREAS}
    return levels, [row.expected_start for row in plan_spec(spec).rows]


def test_without_accounting_the_queue_and_the_records_answer(desk: Desk):
    changes = (
        ("AccountingStorageType=accounting_storage/slurmdbd", "AccountingStorageType=accounting_storage/none"),
        ("AccountingStorageEnforce=associations,limits,qos\n", ""),
        ("AccountingStorageTRES=gres/gpu\n", ""),
    )
    with reconfigured(desk.slurm, *changes):
        desk.fill()
        job_id, run = desk.run(*ONE_GPU)
        desk.wait(lambda: desk.reason(job_id)[1] == "Resources", "a reason")
        report = find_status()
        assert (report.notes, report.runs[0].rank, report.runs[0].state) == ((), 1, "PENDING")
        page = describe_run(run.id)
        assert [note.partition(" (")[0] for note in page.notes] == [
            "past jobs not readable: Slurm's accounting database can't be reached"
        ]
        assert page.status.rank == 1
        answer = explain_job(job_id)
        assert (answer.reason, answer.rank, answer.notes) == ("Resources", 1, ())
        append_submission(run, Submission("4000000", "slurm", time.time(), "here"))
        report = find_status()
        assert (report.runs[0].state, len(report.notes)) == ("UNKNOWN", 1)
        levels, starts = look_further(desk.scratch)
        assert levels["accounting"] == ("warning", "accounting_storage/none: Slurm forgets ended jobs")
        assert "account" not in levels
        assert None not in starts


def test_with_private_data_no_rank_is_invented(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    """As another user, who sees his own jobs only: the queue is longer than what he sees."""
    with reconfigured(desk.slurm, ("PriorityType=", "PrivateData=jobs\nPriorityType=")):
        desk.fill()
        desk.submit(*ONE_GPU, "--qos=boost_qos_dbg")
        mine = desk.submit(*ONE_GPU, f"--uid={OTHER_USER}", f"--account={ACCOUNT}", "--chdir=/")
        desk.wait(lambda: desk.reason(mine)[1] == "Priority", "a reason")
        desk.slurm.root.chmod(0o755)
        (
            diagnose(),
            look_further(desk.scratch),
            CliRunner().invoke(app, ["status"]),
        )  # all is imported: the child may not read root's packages
        with tempfile.TemporaryDirectory() as scratch:
            shutil.chown(scratch, OTHER_USER)
            monkeypatch.setenv("LORA_JOBS_HOME", f"{scratch}/runs")
            seen = as_user(OTHER_USER, lambda: observe_as_json(mine))
            answer = as_user(OTHER_USER, lambda: explain_job(mine).to_json())
            levels, starts = as_user(OTHER_USER, lambda: look_further(Path(scratch)))
            screen = as_user(OTHER_USER, lambda: show_status_of(mine, Path(scratch) / "runs"))
    assert (answer["reason"], answer["rank"], answer["notes"]) == ("Priority", None, seen["notes"])
    assert screen[0] == 0
    assert f"{mine} PENDING" in screen[1]
    assert "others go first" in screen[1]
    assert " pending, " not in screen[1]
    assert "no rank in the queue: this cluster shows you your own jobs only" in " ".join(screen[1].split())
    assert levels["privacy"][0] == "warning"
    assert "PrivateData=jobs: others' jobs are hidden" in levels["privacy"][1]
    assert None not in starts
    assert seen == {
        "state": "PENDING",
        "reason": "Priority",
        "rank": None,
        "factors": True,
        "notes": ["no rank in the queue: this cluster shows you your own jobs only (PrivateData=jobs)"],
    }


def show_status_of(job_id: str, home: Path) -> tuple[int, str]:
    """What the command ends with and prints, for a run whose job that is."""
    append_submission(create_run(home, "mine-1", FILES), Submission(job_id, "slurm", time.time(), "here"))
    done = CliRunner().invoke(app, ["status"])
    return done.exit_code, done.output


def test_a_job_in_a_hidden_partition_is_seen(desk: Desk):
    """As another user: root sees hidden partitions without being asked."""
    hide = ("scontrol", "update", "PartitionName=lrd_all_serial")
    desk.slurm.call(*hide, "Hidden=YES")
    try:
        job_id = desk.submit(
            "--partition=lrd_all_serial", "--time=00:10:00", "--begin=now+1hour", f"--uid={OTHER_USER}",
            f"--account={ACCOUNT}", "--chdir=/",
        )  # fmt: skip
        desk.wait(lambda: desk.reason(job_id)[1] == "BeginTime", "a reason")
        desk.slurm.root.chmod(0o755)
        observe_jobs([job_id])  # all is imported: the child may not read root's packages
        seen = as_user(OTHER_USER, lambda: observe_as_json(job_id))
    finally:
        desk.slurm.call("scancel", f"--user={OTHER_USER}", check=False)
        desk.slurm.call(*hide, "Hidden=NO")
    assert (seen["state"], seen["reason"], seen["rank"], seen["notes"]) == ("PENDING", "BeginTime", 1, [])


def observe_as_json(job_id: str) -> dict[str, Any]:
    seen: Observation = observe_jobs([job_id])
    found = seen.jobs[job_id]
    return {
        "state": found.job.state,
        "reason": found.job.reason,
        "rank": found.place and found.place.rank,
        "factors": found.job.factors is not None,
        "notes": list(seen.notes),
    }


def as_user(name: str, call: Callable[[], Any]) -> Any:
    """What `call` returns (as JSON) in a child process of that user: the interpreter itself is root's alone."""
    user = pwd.getpwnam(name)
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.setgroups([])
            os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
            os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
            os.chdir("/")
            os.write(writer, json.dumps(call()).encode())
        except BaseException as error:  # noqa: BLE001 - nothing of the test session may run on in the child
            os.write(writer, json.dumps(repr(error)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        answer = file.read()
    os.waitpid(pid, 0)
    return json.loads(answer)


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lora_jobs", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True)
