"""The whole queue to ranks, over what a real Slurm answered and over other versions' documented differences."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_jobs.cluster.partition import PartitionView, parse_partition
from lora_jobs.cluster.queue import Place, Waiting, count_gpus, find_places, fold_tasks, parse_queue
from lora_jobs.cluster.reasons import explain_reason
from lora_jobs.errors import OutputError

RECORDED = Path(__file__).parents[2] / "slurm_output"


def load(version: str, name: str) -> str:
    return (RECORDED / version / f"{name}.txt").read_text()


def test_my_jobs_and_who_waits():
    queue = parse_queue(load("22.05", "queue"), ["2", "3_2", "3", "4", "99"], users=["root"])
    seen = {job_id: [(row.job_id, row.state, row.reason) for row in rows] for job_id, rows in queue.jobs.items()}
    assert seen == {
        "2": [("2", "PENDING", "Resources")],
        "3": [("3_[0-3,7%2]", "PENDING", "Priority")],
        "3_2": [("3_[0-3,7%2]", "PENDING", "Priority")],
        "4": [("4", "PENDING", "Dependency")],
    }
    assert queue.jobs["4"][0].dependency == "afterok:1(unfulfilled)"
    assert queue.waiting[:2] == (
        Waiting("2", "boost_usr_prod", "root", "iscrc_test", 10543, 1, "2", "gres:gpu:4", "30:00"),
        Waiting("3_[0-3,7%2]", "boost_usr_prod", "root", "iscrc_test", 10371, 5, "1", "gres:gpu:1", "10:00"),
    )
    assert [(row.job_id, row.tasks) for row in queue.waiting[2:]] == [("4", 1), ("5", 1), ("6", 1)]
    assert [job.job_id for job in queue.of_users] == ["1", "5", "6"], "what was not asked for by id"


def test_places():
    queue = parse_queue(load("22.05", "queue"), ["1", "2", "3", "5", "6"])
    places = find_places(queue.waiting, {job_id: rows[0] for job_id, rows in queue.jobs.items()})
    assert places == {
        "2": Place("boost_usr_prod", 1, 9, 0, 0, 0, 0, 0),
        "3": Place("boost_usr_prod", 2, 9, 1, 2, 8, 4.0, 1),
        "6": Place("boost_usr_prod", 2, 9, 1, 2, 8, 4.0, 1),
    }, "1 runs, 5 is held; an array's five tasks count five times"


def test_of_several_partitions_the_best_place_counts():
    row = "{}|PENDING|Priority|{}|u|a|q|{}|2026-01-01T00:00:00|N/A|0:00|10:00|1|N/A||(null)|(null)|n\n"
    text = row.format(1, "p,r", 5) + row.format(2, "p", 9) + row.format(3, "p", 8) + row.format(4, "r,s", 7)
    queue = parse_queue(text, ["1"])
    assert find_places(queue.waiting, {"1": queue.jobs["1"][0]}) == {"1": Place("r", 2, 2, 1, 1, 0, 0, 1)}


def test_tasks_are_folded():
    row = "{}|{}|None|p|u|a|q|5|2026-01-01T00:00:00|N/A|0:00|10:00|1|N/A||(null)|(null)|n\n"
    text = row.format("7_[3-9%2]", "PENDING") + row.format("7_1", "RUNNING") + row.format("7_2", "FAILED")
    job, tasks = fold_tasks(parse_queue(text, ["7"]).jobs["7"])
    assert (job.job_id, tasks) == ("7_1", {"PENDING": 7, "RUNNING": 1, "FAILED": 1})


@pytest.mark.parametrize(
    ("version", "wanted"),
    [
        ("20.11", [("15", "PENDING", 4, True), ("16", "PENDING", 1, True)]),
        ("23.11", [("15", "PENDING", 4, True), ("16", "PENDING", 1, True)]),
        ("24.05", [("15", "PENDING", 4, True), ("16", "POWER_UP_NODE", 1, True)]),
        ("24.11", [("15", "PENDING", 4, True), ("16", "PENDING", 1, True)]),
        ("25.05", [("15", "PENDING", 4, True), ("16", "EXPEDITING", 1, False)]),
    ],
)
def test_other_versions(version: str, wanted: list[tuple[str, str, int, bool]]):
    jobs = parse_queue(load(version, "queue"), ["15", "16"]).jobs
    rows = [jobs[job_id][0] for job_id in ("15", "16")]
    seen = [(row.job_id, row.state, count_gpus(row.gpus), explain_reason(row.reason).known) for row in rows]
    assert seen == wanted
    assert rows[1].name == "job.sh"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("gres:gpu:4", 4), ("gres/gpu:a100:4", 4), ("gpu:1", 1), ("gpu:tesla:2", 2), ("gres/gpu:h100:2,gres/gpu:l4:1", 3),
     ("gres:gpu", 1), ("N/A", 0), (None, 0), ("gres/shard:4", 0)],
)  # fmt: skip
def test_gpus(text: str | None, wanted: int):
    assert count_gpus(text) == wanted


def test_banners_are_passed_over_and_nonsense_is_quoted():
    text = load("22.05", "queue")
    assert parse_queue("** maintenance on Monday **\n" + text, ["2"]) == parse_queue(text, ["2"])
    assert parse_queue("", ["2"]).waiting == ()
    with pytest.raises(OutputError, match="502"):
        parse_queue("<html>502</html>\n", ["2"])


def test_nodes_of_a_partition():
    assert parse_partition(load("22.05", "sinfo_nodes")) == PartitionView(
        name="boost_usr_prod",
        available="up",
        nodes=2,
        states={"draining": 1, "mixed": 1},
        away=("lrdn0002 draining: broken | fan",),
        limit_seconds=86400,
        max_nodes=2,
    )
    silent = "p*|up|infinite|1-infinite|3|idle*|n[1-3]|Not responding\n"
    assert parse_partition(silent) == PartitionView(
        "p", "up", 3, {"idle": 3}, ("n[1-3] idle, not answering: Not responding",), None, None
    )
    assert parse_partition("") is None
    with pytest.raises(OutputError):
        parse_partition("Segmentation fault\n")
