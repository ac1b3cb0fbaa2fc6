"""What keeps the results of `make faults` from being published: a goal missed, a failure, a skip, a part left out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from faults_goals import count_figures, find_misses

KILL = {"group": "kill", "ours": "same result", "kills": 150, "worst_lost_steps": 2, "ended_by_launcher": 1}
SIGNAL = {"group": "signal", "case": "at once", "ours": "saved, same result", "lost_steps": 0}
PREFIX = {"group": "crash prefix", "ours": "last committed", "states": 520}
BACK = {"group": "damage", "case": "a bit", "ours": "fell back", "good_one_exists": True}


def build_results(**rows: dict[str, Any]) -> dict[str, Any]:
    """Results of a run that keeps every promise; a keyword replaces values of the row of that name."""
    parts = {
        "damage:0/1": [{**BACK, **rows.get("damage", {})}],
        "kills:0/1": [{**KILL, "victim": "launcher", **rows.get("kill", {})}, {**KILL, "victim": "batch shell"}],
        "signals:0/1": [{**SIGNAL, **rows.get("signal", {})}],
        "prefixes:0/1": [{**PREFIX, **rows.get("prefix", {})}],
        "short:0/1": [],
    }
    found = {name: {"tests": 3, "failed": [], "seconds": 200.0, "rows": part} for name, part in parts.items()}
    costs = {"commit_percent_of_5_minutes": 0.14, **rows.get("costs", {})}
    whole = {"seconds": 2800.0, **rows.get("whole", {})}
    return {**found, "costs": {"rows": [], "costs": costs}, "whole": {"rows": [], **whole}}


def test_a_run_that_keeps_every_promise_is_published() -> None:
    results = build_results()
    assert find_misses(results, []) == []
    figures = count_figures(results)
    assert (figures.kills, figures.launcher_kills, figures.shell_kills, figures.resumes) == (300, 150, 150, 302)
    assert figures.ended_by_launcher == 2


@pytest.mark.parametrize(
    ("changed", "values", "words"),
    [
        ("signal", {"ours": "other result"}, "no silent wrong resume: 1 in 302"),
        ("damage", {"ours": "refused"}, "falls back wherever an older good one exists: 0 of 1"),
        ("damage", {"good_one_exists": False}, "falls back wherever an older good one exists: 0 of 0"),
        ("signal", {"hung": True}, "no hang: 1"),
        ("signal", {"lost_steps": 1}, "a signal loses no step: 1"),
        ("prefix", {"states": 0}, "crash states replayed: 0"),
        ("kill", {"kills": 149}, "300 kills or more: 299"),
        ("kill", {"victim": "ranks"}, "the launcher and the batch shell among them: 0 and 150"),
        ("kill", {"ours": "ended"}, "every killed run ends with the adapter of the uninterrupted one: 1 of 2"),
        ("kill", {"worst_lost_steps": 3}, "kill -9 loses at most one save interval (2 steps): 3"),
        ("costs", {"commit_percent_of_5_minutes": 1.0}, "less than 1 % of the training time: 1.0 %"),
        ("whole", {"seconds": 3600.0}, "make faults takes less than an hour: 3600.0 s"),
    ],
)
def test_a_missed_goal_is_a_miss(changed: str, values: dict[str, Any], words: str) -> None:
    (miss,) = find_misses(build_results(**{changed: values}), [])
    assert miss.startswith("goal missed: ")
    assert words in miss


def test_what_failed_or_was_not_run_is_a_miss() -> None:
    results = build_results()
    results["kills:0/1"]["failed"] = ["test_kill"]
    results["signals:0/1"]["tests"] = 0
    results["damage:0/1"]["rows"].append({"group": "skipped", "case": "test_mount", "why": "needs root"})
    assert find_misses(results, ["slurm:0/1"]) == [
        "kills:0/1: failed: test_kill",
        "damage:0/1: skipped: test_mount: needs root",
        "signals:0/1: no test ran",
        "slurm:0/1: not run",
    ]
    assert len(find_misses({}, [])) >= 10, "what was not measured is not met"
