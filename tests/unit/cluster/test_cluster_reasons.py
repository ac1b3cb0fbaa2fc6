"""Every reason code of Slurm has an entry in plain words; what nobody knows is shown as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_jobs.cluster.reasons import REASONS, explain_reason

CODES = Path(__file__).parents[2] / "slurm_output" / "reason_codes.txt"


def test_every_code_of_the_manual_has_an_entry():
    codes = [line for line in CODES.read_text().splitlines() if line and not line.startswith("#")]
    assert len(codes) > 190
    entries = {code: explain_reason(code) for code in codes}
    assert [code for code, entry in entries.items() if not entry.known] == []
    assert [code for code, entry in entries.items() if entry.code != code] == []
    assert [code for code, entry in entries.items() if "{" in f"{entry.short}{entry.meaning}"] == []
    assert [code for code, entry in entries.items() if len(entry.short) > 45 or not entry.advice] == []


def test_no_row_of_the_table_is_one_that_slurm_never_prints():
    codes = CODES.read_text().split()
    assert [reason.code for reason in REASONS if reason.code not in codes] == []
    assert len({reason.code for reason in REASONS}) == len(REASONS)


@pytest.mark.parametrize(
    ("text", "meaning", "turn"),
    [
        ("QOSMaxJobsPerUserLimit", "as many jobs run as its QOS allows", "wait"),
        ("QOSMaxGRESPerUser", "you would use more GPUs (GRES) than its QOS allows one user at a time", "wait"),
        ("QOSMaxWallDurationPerJobLimit", "its time limit is longer than its QOS allows", "you"),
        ("QOSGrpNodeLimit", "the jobs of your account would use more nodes at a time than its QOS allows", "wait"),
        ("AssocGrpCPUMinutesLimit", "the budget of your account for cores is used up", "you"),
        ("AssocMaxCpuPerNode", "it asks for more cores per node than your account allows", "you"),
        ("AssocMaxSubmitJobLimit", "as many jobs are queued or running as your account allows", "wait"),
        ("MaxJobsPerAccount", "as many jobs of your account run as its QOS allows", "wait"),
        ("QOSMinGRES", "it asks for fewer GPUs (GRES) than its QOS wants", "you"),
        ("(Priority)", explain_reason("Priority").meaning, "wait"),
        ("ReqNodeNotAvail, UnavailableNodes:lrdn[0001-0002]", explain_reason("ReqNodeNotAvail").meaning, "wait"),
        ("ReqNodeNotAvail(Unavailable:lrdn0001)", explain_reason("ReqNodeNotAvail").meaning, "wait"),
        (
            "Nodes_required_for_job_are_DOWN,_DRAINED_or_reserved_for_jobs_in_higher_priority_partitions",
            explain_reason("ReqNodeNotAvail").meaning,
            "wait",
        ),
        ("launch failed requeued held", explain_reason("JobLaunchFailure").meaning, "you"),
        (None, explain_reason("None").meaning, "wait"),
    ],
)
def test_codes_with_details_and_limits_by_their_parts(text: str | None, meaning: str, turn: str):
    entry = explain_reason(text)
    assert (entry.meaning, entry.turn, entry.known) == (meaning, turn, True)


@pytest.mark.parametrize("text", ["MoonPhase", "MoonPhase, Waxing:lrdn0001", "some free text of a plugin"])
def test_what_nobody_knows_is_shown_raw(text: str):
    entry = explain_reason(text)
    assert (entry.code, entry.meaning, entry.known) == (text, f"Slurm says: {text}", False)
