"""Every way that a run can be stopped or damaged, and what stock resume and ours do then: `make faults`.

Runs the long form of tests/faults and the Slurm cases of tests/cluster, two processes at a time, and writes
benchmarks/results/faults.json and docs/faults.md. --only GROUP runs one part again and keeps the others' rows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from faults_costs import measure_costs
from faults_page import render_page

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "faults.json"
PAGE = ROOT / "docs" / "faults.md"
SAVE_STEPS = 2
PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed")

# Cases that tests/cluster/test_end_to_end.py holds already, by the words of the table.
ON_SLURM = {
    "test_signal_saves_requeues_and_ends_with_the_same_adapter": "scancel --signal=USR2",
    "test_preemption_loses_no_committed_step_and_comes_back_by_itself": "preemption with grace",
    "test_a_lost_node_costs_only_what_was_not_committed": "a node goes down",
    "test_a_signal_before_training_begins_does_not_end_the_job": "SIGTERM while Python starts",
    "test_time_limit_signal_saves_and_requeues": "time limit",
    "test_cancelled_job_stays_cancelled_and_resume_goes_on": "scancel, then resume by the old id",
}


@dataclass(frozen=True)
class Part:
    """One pytest process."""

    name: str
    paths: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()


def list_parts(kills: int) -> list[Part]:
    """The longest first; the two halves of the kills run beside each other or beside something else."""
    number = {"LORA_JOBS_FAULTS_KILLS": f"{kills}"}
    kill = ("tests/faults/test_kills.py",)
    return [
        Part("damage", ("tests/faults/test_damaged_checkpoints.py",), arguments=("-k", "not nothing_is_trained_from")),
        Part("kills", kill, {**number, "LORA_JOBS_FAULTS_PART": "0/2"}),
        Part("kills", kill, {**number, "LORA_JOBS_FAULTS_PART": "1/2"}),
        Part(
            "slurm",
            ("tests/cluster/test_end_to_end.py", "tests/cluster/test_slurm_faults.py"),
            arguments=("-k", "not hostile and not refused"),
        ),
        Part("signals", ("tests/faults/test_signals.py",)),
        Part("disk", ("tests/faults/test_full_disk.py",)),
        Part("prefixes", ("tests/faults/test_crash_prefixes.py",)),
        Part("drift", ("tests/faults/test_drift_of_each_key.py",)),
    ]


def run_part(part: Part, directory: Path) -> tuple[list[dict[str, Any]], list[str], float]:
    """(rows, names of the tests that failed, seconds)."""
    directory.mkdir()
    rows, report, log = directory / "rows.jsonl", directory / "report.xml", directory / "log"
    environment = {**os.environ, "LORA_JOBS_FAULTS": "long", "LORA_JOBS_FAULTS_ROWS": str(rows), **part.environment}
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={directory / 'work'}",
        f"--junitxml={report}", *part.arguments, *part.paths,
    ]  # fmt: skip
    began = time.monotonic()
    with log.open("w") as output:
        subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=output, check=False)
    seconds = time.monotonic() - began
    found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    failed = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):  # noqa: S314 - our own file
        name = case.get("name", "")
        bad = case.find("failure") is not None or case.find("error") is not None
        skipped = case.find("skipped")
        if bad:
            failed.append(name)
        if name in ON_SLURM and skipped is None:
            found.append({"group": "slurm", "case": ON_SLURM[name], "ours": "failed" if bad else "same result"})
        elif skipped is not None:
            found.append({"group": "skipped", "case": name, "why": (skipped.get("message") or "")[:200]})
    print(f"{part.name}: {len(found)} rows, {len(failed)} failed, {seconds:.0f} s (log: {log})", flush=True)
    return [{**row, "part": part.name} for row in found], failed, seconds


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures that the README shows."""
    damaged = [row for row in rows if row["group"] in ("damage", "full disk") and "ours" in row]
    compared = [row for row in damaged if row.get("stock", "not applicable") != "not applicable"]
    with_good = [row for row in damaged if row.get("good_one_exists")]
    kills = [row for row in rows if row["group"] == "kill"]
    signals = [row for row in rows if row["group"] in ("signal", "every step")]
    wrong = [row for row in rows if "wrong" in str(row.get("ours")) or "other result" in str(row.get("ours"))]
    return {
        "damaged_checkpoints": len(damaged),
        "compared_with_stock": len(compared),
        "stock": dict(Counter(row["stock"].partition(";")[0] for row in compared)),
        "stock_ran_hidden_code": sum("ran the hidden code" in row["stock"] for row in compared),
        "ours": dict(Counter(row["ours"] for row in damaged)),
        "ours_silent_wrong_resumes": len(wrong),
        "ours_fall_back_percent": round(100 * sum(row["ours"] == "fell back" for row in with_good) / len(with_good), 1)
        if with_good
        else None,
        "ours_hangs": sum(bool(row.get("hung")) or str(row.get("ours", "")).startswith("hung") for row in rows),
        "crash_states": sum(row.get("states", 0) for row in rows),
        "kills": sum(row["kills"] for row in kills),
        "killed_runs": len(kills),
        "killed_runs_same_result": sum(row["ours"] == "same result" for row in kills),
        "worst_lost_steps_kill": max((row["worst_lost_steps"] for row in kills), default=None),
        "save_interval_steps": SAVE_STEPS,
        "signals": sum(row.get("interruptions", 1) for row in signals),
        "worst_lost_steps_signal": max((row["lost_steps"] for row in signals), default=None),
        "slurm_cases": sum(row["group"] == "slurm" for row in rows),
    }


def describe_machine() -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        **{name: version(name) for name in PACKAGES},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=300, help="how often kill -9 (300)")
    parser.add_argument("--only", action="append", help="one part (repeatable); the others' rows are kept")
    arguments = parser.parse_args()
    began = time.monotonic()
    parts = [part for part in list_parts(arguments.kills) if not arguments.only or part.name in arguments.only]
    names = {part.name for part in parts}
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rows = [row for row in before.get("rows", []) if row["part"] not in names]
    failures = {name: tests for name, tests in before.get("failed", {}).items() if name not in names}
    seconds = {name: spent for name, spent in before.get("seconds", {}).items() if name not in names}
    directory = Path(tempfile.mkdtemp(prefix="lora-jobs-faults-"))
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(run_part, part, directory / f"{number}") for number, part in enumerate(parts)]
        for part, job in zip(parts, jobs, strict=True):
            found, failed, spent = job.result()
            rows += found
            seconds[part.name] = round(seconds.get(part.name, 0) * (part.name == "kills") + spent, 1)
            if failed:
                failures.setdefault(part.name, []).extend(failed)
    costs = measure_costs() if not arguments.only or "costs" in arguments.only else before.get("costs", {})
    document = {
        "summary": summarize(rows),
        "costs": costs,
        "failed": failures,
        "seconds": seconds,
        "machine": describe_machine(),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    page = render_page(document)
    PAGE.write_text(page)
    print(page)
    print(f"{time.monotonic() - began:.0f} s; {sum(map(len, failures.values()))} tests failed: {failures}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
