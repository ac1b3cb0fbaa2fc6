"""sinfo, scontrol and sacctmgr to values: recorded answers of 22.05, and the shapes that the manuals document."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_jobs.cluster.inventory import (
    Association,
    Gres,
    Inventory,
    NodeGroup,
    Qos,
    parse_associations,
    parse_gres,
    parse_pairs,
    parse_partitions,
    parse_qos,
    parse_sinfo,
    parse_version,
    read_inventory,
)
from lora_jobs.cluster.parsers import parse_config
from lora_jobs.errors import OutputError

RECORDED = Path(__file__).parents[2] / "slurm_output" / "22.05"


def load(name: str) -> str:
    return (RECORDED / f"{name}.txt").read_text()


def test_recorded_nodes():
    a100 = (Gres("a100", 4),)
    assert parse_sinfo(load("sinfo")) == [
        NodeGroup("boost_usr_prod", "up", 86400, 1, 32, 494000, "drained", a100, ("a100",)),
        NodeGroup("boost_usr_prod", "up", 86400, 1, 32, 494000, "idle", a100, ("a100",)),
        NodeGroup("boost_urgent", "up", 3600, 1, 32, 494000, "drained", a100, ("a100",)),
        NodeGroup("boost_urgent", "up", 3600, 1, 32, 494000, "idle", a100, ("a100",)),
        NodeGroup("lrd_all_serial", "up", 14400, 1, 32, 64000, "idle", (), ()),
    ]


def test_recorded_partitions():
    found = parse_partitions(load("scontrol_partition"))
    assert [(row.name, row.default, row.state, row.limit_seconds, row.max_nodes, row.qos) for row in found] == [
        ("boost_usr_prod", True, "UP", 86400, 2, None),
        ("boost_urgent", False, "UP", 3600, None, None),
        ("lrd_all_serial", False, "UP", 14400, 1, None),
    ]
    assert found[0].raw["TRES"] == "cpu=64,mem=988000M,node=2,billing=64,gres/gpu=8"


def test_recorded_configuration_qos_and_accounts():
    config = parse_config(load("scontrol_config"))
    wanted = ("ClusterName", "PriorityType", "PriorityWeightAge", "SchedulerType", "PrivateData", "SLURM_VERSION")
    assert [config[key] for key in wanted] == [
        "leotest", "priority/multifactor", "1000", "sched/backfill", "none", "22.05.8",
    ]  # fmt: skip
    assert parse_qos(load("sacctmgr_qos")) == [
        Qos("normal", 0, None, None, {"Name": "normal", "Priority": "0"}),
        Qos("boost_qos_dbg", 10, 1800, 2, {
            "Name": "boost_qos_dbg", "Priority": "10", "MaxWall": "00:30:00", "MaxTRES": "node=2",
            "Flags": "DenyOnLimit",
        }),
        Qos("boost_qos_one", 0, None, None, {
            "Name": "boost_qos_one", "Priority": "0", "MaxSubmitPU": "1", "Flags": "DenyOnLimit",
        }),
    ]  # fmt: skip
    assert parse_associations(load("sacctmgr_assoc"), "leotest") == [
        Association("iscrc_test", None, ("boost_qos_dbg", "boost_qos_one", "normal")),
        Association("root", None, ("normal",)),
    ]
    assert parse_associations(load("sacctmgr_assoc"), "another") == []
    limited = "c|acc|gpu|normal|5|10|1-00:00:00|gres/gpu=8|\n"
    assert parse_associations(limited) == [
        Association(
            "acc", "gpu", ("normal",), ("MaxJobs 5", "MaxSubmit 10", "MaxWall 1-00:00:00", "MaxTRES gres/gpu=8")
        )
    ]


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (load("sinfo_version"), "22.05.8"),
        ("slurm 20.11.9\n", "20.11.9"),
        ("slurm 23.11.10-1\n", "23.11.10-1"),
        ("slurm 25.05.0-0rc1", "25.05.0-0rc1"),
        ("", None),
    ],
)
def test_versions(text: str, version: str | None):
    assert parse_version(text) == version


@pytest.mark.parametrize(
    ("text", "gpus"),
    [
        # gres.conf(5) and sinfo(1): a type is optional, sockets and indices stand in parentheses, other GRES beside it.
        ("gpu:4", [(None, 4)]),
        ("gpu:a100:4(S:0-1)", [("a100", 4)]),
        ("gpu:a100_3g.20gb:2(S:0),gpu:a100:3(S:0)", [("a100_3g.20gb", 2), ("a100", 3)]),
        ("gpu:h100:8(IDX:0-7),nvme:1", [("h100", 8)]),
        ("nvme:1,gpu:v100:2", [("v100", 2)]),
        ("gpu", [(None, 1)]),
        ("gpu:0", []),
        ("mygpu:4", []),
        ("(null)", []),
    ],
)
def test_gres(text: str, gpus: list[tuple[str | None, int]]):
    assert [(gres.type, gres.count) for gres in parse_gres(text)] == gpus


def test_sinfo_of_unlike_nodes_banners_and_unknown_words():
    text = "Welcome!\nmix*|up|infinite|3|32+|64000+|planned$|gpu:2,shard:8|a,b\n"
    assert parse_sinfo(text) == [NodeGroup("mix", "up", None, 3, 32, 64000, "planned$", (Gres(None, 2),), ("a", "b"))]
    assert parse_sinfo("") == []
    with pytest.raises(OutputError, match="no list of nodes"):
        parse_sinfo("slurm_load_partitions: something new\n")


def test_partition_lines_of_newer_versions_keep_what_is_new():
    line = (
        "PartitionName=p AllowQos=a,b Default=NO MaxTime=UNLIMITED MaxNodes=UNLIMITED State=DRAIN SuspendTime=x y Z=1"
    )
    (found,) = parse_partitions(line)
    assert (found.limit_seconds, found.max_nodes, found.qos, found.state) == (None, None, ("a", "b"), "DRAIN")
    assert found.raw["SuspendTime"] == "x y"
    assert parse_pairs("no pairs here") == {}


def write_program(directory: Path, name: str, text: str, status: int = 0) -> None:
    (directory / f"{name}.out").write_text(f"{text}\n")
    stream = "" if status == 0 else " >&2"
    program = directory / name
    program.write_text(
        f"#!/bin/sh\necho {name} >> {directory}/calls\n"
        f"while IFS= read -r line; do echo \"$line\"{stream}; done < {directory}/{name}.out\nexit {status}\n"
    )  # fmt: skip
    program.chmod(0o755)


def test_without_a_controller_one_question_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    write_program(tmp_path, "sinfo", "slurm 24.05.1")
    write_program(tmp_path, "scontrol", "Unable to contact slurm controller (connect failure)", status=1)
    found = read_inventory("me")
    assert found.version == "24.05.1"
    assert len(found.notes) == 1
    assert found.notes[0].startswith("configuration not readable: Slurm's controller can't be reached")
    assert (tmp_path / "calls").read_text().split() == ["scontrol", "sinfo"]


def test_nothing_there_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_inventory("me") == Inventory(
        notes=(
            "configuration not readable: scontrol is not on PATH",
            "version not readable: sinfo is not on PATH",
        )
    )
