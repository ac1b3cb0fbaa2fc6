"""Every parser over other versions' shapes (tests/slurm_output/<version>; each file says where its shape is from)."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_jobs.cluster.inventory import Gres, parse_partitions, parse_sinfo
from lora_jobs.cluster.parsers import Factors, parse_config, parse_sacct, parse_sprio, parse_test_only
from lora_jobs.cluster.partition import parse_partition
from lora_jobs.runs import explain_state, is_ended

RECORDED = Path(__file__).parents[2] / "slurm_output"
VERSIONS = ("20.11", "23.11", "24.05", "24.11", "25.05")


def load(version: str, name: str) -> str:
    return (RECORDED / version / f"{name}.txt").read_text()


@pytest.mark.parametrize("version", VERSIONS)
def test_each_file_says_where_its_shape_is_from(version: str):
    files = sorted((RECORDED / version).glob("*.txt"))
    assert {file.stem for file in files} >= {
        "queue", "sacct", "scontrol_config", "scontrol_partition", "sinfo", "sinfo_nodes", "sprio",
    }  # fmt: skip
    assert [file.name for file in files if not file.read_text().startswith("# Not recorded: ")] == []


@pytest.mark.parametrize(
    ("version", "states", "kind"),
    [
        ("20.11", ["mixed", "drained*"], "a100"),
        ("23.11", ["mixed-", "inval"], "a100"),
        ("24.05", ["planned", "blocked"], "a100"),
        ("24.11", ["powering_up", "idle~"], "a100"),
        ("25.05", ["hibernating+", "down*"], "nvidia_a100"),
    ],
)
def test_sinfo(version: str, states: list[str], kind: str):
    groups = parse_sinfo(load(version, "sinfo"))
    assert [group.state for group in groups] == states, "as they are, known or not"
    assert {(group.partition, group.cpus, group.memory_mb, group.gpus) for group in groups} == {
        ("boost", 32, 494000, (Gres(kind, 4),))
    }
    assert [group.nodes for group in groups] == [2, 1]


@pytest.mark.parametrize(
    ("version", "states", "away", "limit"),
    [
        ("20.11", {"mixed": 2, "drained": 1}, ("lrdn0003 drained, not answering: Not responding",), 86400),
        ("23.11", {"mixed": 2, "inval": 1},
         ("lrdn0003 inval: gres/gpu count reported lower than configured (0 < 4)",), 86400),
        ("24.05", {"planned": 2, "blocked": 1}, ("lrdn0003 blocked",), 86400),
        ("24.11", {"powering_up": 2, "reboot": 1}, ("lrdn0003 reboot: reboot requested | by ops",), None),
        ("25.05", {"hibernating": 2, "down": 1}, ("lrdn0003 down, not answering: Not responding",), 86400),
    ],
)  # fmt: skip
def test_nodes_of_a_partition(version: str, states: dict[str, int], away: tuple[str, ...], limit: int | None):
    view = parse_partition(load(version, "sinfo_nodes"))
    assert view is not None
    assert (view.name, view.nodes, view.states, view.away, view.limit_seconds) == ("boost", 3, states, away, limit)


@pytest.mark.parametrize(
    ("version", "rules"),
    [
        ("20.11", (True, "UP", 86400, 2, ("normal", "dbg"))),
        ("23.11", (True, "UP", 86400, 2, None)),
        ("24.05", (True, "UP", 86400, 2, None)),
        ("24.11", (False, "INACTIVE", None, None, None)),
        ("25.05", (True, "UP", 86400, 2, None)),
    ],
)
def test_partitions(version: str, rules: tuple[object, ...]):
    (found,) = parse_partitions(load(version, "scontrol_partition"))
    assert (found.default, found.state, found.limit_seconds, found.max_nodes, found.qos) == rules
    assert found.raw["Nodes"] == "lrdn[0001-0003]"
    assert ("TRES" in found.raw) is (version != "20.11")


@pytest.mark.parametrize(
    ("version", "nice", "site", "association", "priority"),
    [("20.11", 0, 0, 0, 5543), ("23.11", 0, 0, 0, 7343), ("24.05", 100, 0, 30, 5543), ("24.11", -100, 0, 0, 5543),
     ("25.05", 0, 7, 0, 5543)],
)  # fmt: skip
def test_sprio(version: str, nice: int, site: int, association: int, priority: int):
    found = parse_sprio(load(version, "sprio"))
    whole = 5000 + 172 + 200 + 43 + site + association - nice
    assert found["16"] == Factors(whole, 0, 5000, 172, 200, 0, 43, site, nice, association)
    assert found["15"].priority == priority, "of two partitions the one where it stands highest"


@pytest.mark.parametrize(
    ("version", "rows"),
    [
        ("20.11", [("12", "CANCELLED", "lrdn0001"), ("13_[2-5]", "PENDING", None)]),
        ("23.11", [("12", "REQUEUED", "lrdn0001"), ("12", "COMPLETED", "lrdn0002")]),
        ("24.05", [("12", "OUT_OF_MEMORY", "lrdn0001"), ("13_4", "NODE_FAIL", "lrdn0002")]),
        ("24.11", [("12", "PREEMPTED", "lrdn0001"), ("13", "DEADLINE", None)]),
        ("25.05", [("12", "TIMEOUT", "lrdn0001"), ("13", "SIMMERING", None)]),
    ],
)
def test_sacct(version: str, rows: list[tuple[str, str, str | None]]):
    jobs = parse_sacct(load(version, "sacct"))
    assert [(job.job_id, job.state, job.node_list) for job in jobs] == rows
    assert (jobs[0].elapsed_seconds, jobs[0].started, jobs[0].limit_seconds) == (600, "2026-11-20T19:59:59", 600)
    assert [job.state for job in jobs if explain_state(job.state) is None] == ["SIMMERING"] * (version == "25.05")
    assert not is_ended("SIMMERING"), "what nobody knows is not taken for over"


@pytest.mark.parametrize("version", VERSIONS)
def test_configuration(version: str):
    config = parse_config(load(version, "scontrol_config"))
    assert config["SLURM_VERSION"].startswith(version)
    assert (config["PriorityType"], config["PriorityWeightAge"]) == ("priority/multifactor", "1000")
    assert ("jobs" in config["PrivateData"]) is (version == "23.11")


@pytest.mark.parametrize("version", ["20.11", "22.05", "25.05"])
def test_forecasts(version: str):
    assert parse_test_only(load(version, "test_only")) == "2026-11-20T19:59:57"


def test_what_is_held_since_its_reservation_is_gone_still_waits():
    state = explain_state("RESV_DEL_HOLD")
    assert state is not None
    assert not state.has_ended
