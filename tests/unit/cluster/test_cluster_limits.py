"""The limits behind a reason: recorded answers of 22.05 (tests/slurm_output/record.py says of what)."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_jobs.cluster.limits import (
    ASSOCIATION_LIMITS,
    ask_association_limits,
    ask_partition_qos,
    find_association_limits,
    parse_association_limits,
    parse_qos_limits,
)

RECORDED = Path(__file__).parents[2] / "slurm_output"
GROUP = ("GrpJobs", "GrpTRES", "GrpTRESMins")


def load(name: str) -> str:
    return (RECORDED / "22.05" / f"{name}.txt").read_text()


def test_every_code_of_an_accounts_limit_names_its_columns():
    codes = [code for code in (RECORDED / "reason_codes.txt").read_text().split() if code.startswith("Assoc")]
    assert len(codes) > 55
    named = {code: find_association_limits(code) for code in codes}
    assert [code for code, columns in named.items() if not columns] == []
    assert set().union(*named.values()) == set(ASSOCIATION_LIMITS)
    assert find_association_limits("QOSGrpJobsLimit") == ()


@pytest.mark.parametrize(
    ("code", "columns"),
    [
        ("AssocGrpGRES", ("GrpTRES",)),
        ("AssocGrpGRESMinutes", ("GrpTRESMins",)),
        ("AssocGrpGRESRunMinutes", ("GrpTRESRunMins",)),
        ("AssocGrpCPUMinutesLimit", ("GrpTRESMins",)),
        ("AssocGrpWallLimit", ("GrpWall",)),
        ("AssocMaxCpuPerJobLimit", ("MaxTRES",)),
        ("AssocMaxCpuMinutesPerJobLimit", ("MaxTRESMins",)),
        ("AssocMaxGRESPerNode", ("MaxTRESPerNode",)),
        ("AssocMaxWallDurationPerJobLimit", ("MaxWall",)),
    ],
)
def test_columns_of_a_code(code: str, columns: tuple[str, ...]):
    assert find_association_limits(code) == columns


def test_the_limits_of_a_user_of_the_account_and_of_the_one_above_it():
    text = load("sacctmgr_group_limits")
    assert parse_association_limits(text, "iscrc_test", "root", "boost_usr_prod", GROUP) == [
        ("root in iscrc_test", "GrpJobs 2"),
        ("iscrc_test", "GrpTRESMins gres/gpu=90000"),
        ("institute", "GrpJobs 40, GrpTRES gres/gpu=16"),
    ]
    assert parse_association_limits(text, "iscrc_test", "root", "boost_usr_prod", ["GrpSubmit"]) == []
    assert parse_association_limits(text, "gone", "root", None, GROUP) == []


def test_a_users_row_has_what_it_inherits():
    text = load("sacctmgr_user_limits")
    assert parse_association_limits(text, "iscrc_test", "root", None, ["MaxJobs", "MaxWall"]) == [
        ("root in iscrc_test", "MaxJobs 3, MaxWall 12:00:00")
    ]


def test_an_association_of_another_partition_does_not_count():
    row = "acc|me|{}||||||||{}|||||\n"
    text = row.format("small", 1) + row.format("big", 2) + "a banner of the site\n"
    assert parse_association_limits(text, "acc", "me", "big", ["MaxJobs"]) == [("me in acc", "MaxJobs 2")]


def test_limits_of_several_qos():
    assert parse_qos_limits(load("sacctmgr_qos_limits")) == {
        "normal": "",
        "narrow": "GrpTRESMins gres/gpu=6000, MaxJobsPU 1, MaxTRESPU cpu=64,gres/gpu=4",
    }


def test_questions_that_fail_are_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    notes: list[str] = []
    assert ask_partition_qos("big", notes) is None
    assert ask_association_limits("acc", "me", "big", "leotest", "AssocGrpJobsLimit", notes) == []
    assert notes == [
        "QOS of the partition not readable: scontrol is not on PATH",
        "limits of the account not readable: sacctmgr is not on PATH",
    ]
