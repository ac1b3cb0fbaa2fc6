"""The whole queue to ranks, over what a real Slurm answered and over other versions' documented differences."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lora_jobs.cluster.inventory import parse_associations, parse_partitions, parse_qos, parse_sinfo
from lora_jobs.cluster.parsers import parse_config, parse_sacct, parse_sprio
from lora_jobs.cluster.partition import PartitionView, parse_partition
from lora_jobs.cluster.queue import Place, Waiting, count_gpus, find_places, fold_tasks, parse_queue
from lora_jobs.cluster.reasons import explain_reason
from lora_jobs.cluster.reservations import expand_nodes, parse_reservations
from lora_jobs.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Callable

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


def test_a_job_whose_nodes_boot_waits_no_more():
    row = "{}|{}|{}|p|u|a|q|{}|2026-01-01T00:00:00|2026-01-01T01:00:00|0:09|10:00|1|N/A|n1|(null)|(null)|n\n"
    cells = [("7_0", "CONFIGURING", "None", 9), ("7_[1-2]", "PENDING", "Priority", 9), ("8", "PENDING", "Priority", 5)]
    queue = parse_queue("".join(row.format(*each) for each in cells), ["7", "7_0", "8"])
    job = queue.jobs["7_0"][0]
    assert (job.pending, job.started, job.expected_start) == (False, "2026-01-01T01:00:00", None)
    assert [row.job_id for row in queue.waiting] == ["7_[1-2]", "8"]
    folded, counts = fold_tasks(queue.jobs["7"])
    assert (folded.state, counts) == ("CONFIGURING", {"CONFIGURING": 1, "PENDING": 2})
    places = find_places(queue.waiting, {"7_0": job, "8": queue.jobs["8"][0]})
    assert {job_id: (place.rank, place.pending) for job_id, place in places.items()} == {"8": (3, 3)}


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
        hosts=("lrdn0002", "lrdn0001"),
    )
    silent = "p*|up|infinite|1-infinite|3|idle*|n[1-3]|Not responding\n"
    assert parse_partition(silent) == PartitionView(
        "p", "up", 3, {"idle": 3}, ("n[1-3] idle, not answering: Not responding",), None, None, ("n[1-3]",)
    )
    assert parse_partition("") is None
    with pytest.raises(OutputError):
        parse_partition("Segmentation fault\n")


def test_reservations():
    text = (
        "ReservationName=maint_1 StartTime=2026-11-21T10:00:00 EndTime=2026-11-21T12:00:00 Duration=02:00:00 "
        "Nodes=lrdn[0001-0002] NodeCnt=2 CoreCnt=64 Features=(null) PartitionName=(null) Flags=MAINT,SPEC_NODES "
        "TRES=cpu=64 Users=root Groups=(null) Accounts=(null) Licenses=(null) State=INACTIVE BurstBuffer=(null)\n"
    )
    (found,) = parse_reservations("*** banner ***\n" + text)
    assert found.describe() == (
        "maint_1: lrdn[0001-0002], from 2026-11-21T10:00:00 to 2026-11-21T12:00:00, INACTIVE (MAINT,SPEC_NODES)"
    )
    assert parse_reservations("No reservations in the system\n") == []


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("", set()), ("a", {"a"}), ("n[1-3,07],big1", {"n1", "n2", "n3", "n07", "big1"}),
     ("n[08-10]-ib", {"n08-ib", "n09-ib", "n10-ib"}),
     ("n[1-99999999999]", set()), ("n[", {"n"}), ("n[x-]", set())],
)  # fmt: skip
def test_host_lists(text: str, wanted: set[str]):
    assert expand_nodes(text) == wanted


_PIECES = [
    "1", "12_[0-3,7%2]", "12_[", "12_[9-1]", "-1", "RUNNING", "PENDING", "CANCELLED by 0", "", "N/A", "(null)",
    "UNLIMITED", "1-00:00:00", "99:99:99:99", "2026-11-20T21:43:31", "2026-99-99T99:99:99", "gres:gpu:4", "gres/gpu:",
    "lrdn[0001",
    "\x00", "\x1b[2J", "é", "\ud800", "9" * 40, "INVALID", "p,q,", "=", "%", "NODE_FAIL+", " ",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_whatever_slurm_may_print_some_day_is_read_or_quoted_and_never_crashes(seed: int):
    """Random columns, too few and too many of them, between rows that are good: those are always found."""
    chance = random.Random(seed)  # noqa: S311
    good = load("22.05", "queue").splitlines()[1]
    parsers: dict[str, tuple[int, Callable[[str], object]]] = {
        "queue": (18, lambda text: parse_queue(text, ["1", "2", "12"], users=["root", ""])),
        "sacct": (17, parse_sacct), "sprio": (11, parse_sprio),
        "sinfo": (9, parse_sinfo), "nodes": (8, parse_partition), "partitions": (1, parse_partitions),
        "reservations": (1, parse_reservations), "qos": (9, parse_qos), "associations": (9, parse_associations),
        "config": (1, parse_config),
    }  # fmt: skip
    for _ in range(40):
        for columns, parse in parsers.values():
            size = columns + chance.choice([0, 0, 0, -1, 1])
            rows = ["|".join(chance.choice(_PIECES) for _ in range(max(1, size))) for _ in range(chance.randint(0, 4))]
            with contextlib.suppress(OutputError):
                parse("\n".join(rows))
        queue = parse_queue("\n".join([*rows, good, *rows]), ["2"])
        assert queue.jobs["2"][0].reason == "Resources"
        garbage = ["|".join(chance.choice(_PIECES) for _ in range(18)) for _ in range(3)]
        queue = parse_queue("\n".join([*garbage, good]), ["1", "2", "12"], users=["root"])
        find_places(queue.waiting, {job_id: rows[0] for job_id, rows in queue.jobs.items()})
        for rows_of_job in queue.jobs.values():
            fold_tasks(rows_of_job)
            assert all(explain_reason(job.reason).meaning for job in rows_of_job)
