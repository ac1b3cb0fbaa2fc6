"""Every way that a run can be stopped or damaged, and what stock resume and ours do then: `make faults`.

Runs the long form of tests/faults and the Slurm cases of tests/cluster, two processes at a time, and writes
benchmarks/results/faults.json, docs/faults.md and the README's summary. --only SECTION runs one section again, --only
SECTION:1/4 a quarter of it; what the other sections have measured is kept, with its own date and versions.

Nothing is written there, and the exit status is 1, where a test failed or was skipped, a part was not run or a goal of
faults_goals.py was missed: what was measured stays in the directory that is named at the end.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from faults_costs import measure_costs
from faults_goals import KILLS, find_misses
from faults_page import write_pages

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "faults.json"
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
class Section:
    """Tests that belong together, and into how many pytest processes they are divided."""

    name: str
    paths: tuple[str, ...]
    parts: int = 1
    arguments: tuple[str, ...] = ()
    is_long: bool = True


# The longest first: what runs on Slurm waits two minutes at each requeue, and others go on beside it.
SECTIONS = (
    Section(
        "slurm",
        ("tests/cluster/test_end_to_end.py", "tests/cluster/test_slurm_faults.py"),
        1,
        ("-k", "not hostile and not refused"),
    ),
    Section("damage", ("tests/faults/test_damaged_checkpoints.py",), 6, ("-k", "not nothing_is_trained_from")),
    Section("kills", ("tests/faults/test_kills.py",), 12),
    Section("signals", ("tests/faults/test_signal_moments.py",), 2, ("-k", "loses_no_step")),
    Section("steps", ("tests/faults/test_signal_moments.py",), 6, ("-k", "every_step")),
    Section("disk", ("tests/faults/test_full_disk.py",)),
    Section("prefixes", ("tests/faults/test_crash_prefixes.py",)),
    Section("drift", ("tests/faults/test_drift_of_each_key.py",), 2),
    Section("stops", ("tests/faults/test_stops.py",)),
    # As `make test` runs it: only how long it takes counts here.
    Section("short", ("tests/faults",), is_long=False),
)


@dataclass(frozen=True)
class Part:
    """One pytest process: a section, or its tests number `index`, `index + count`, ..."""

    section: Section
    index: int
    count: int

    @property
    def name(self) -> str:
        return f"{self.section.name}:{self.index}/{self.count}"


def list_parts(only: list[str] | None) -> list[Part]:
    """All parts of all sections, or those that are named (`kills`, `kills:2/6`)."""
    known = {section.name: section for section in SECTIONS}
    parts = []
    for word in only or list(known):
        name, _, piece = word.partition(":")
        if name not in known:
            continue
        index, _, count = piece.partition("/")
        whole = range(known[name].parts)
        parts += (
            [Part(known[name], int(index), int(count))] if piece else [Part(known[name], n, len(whole)) for n in whole]
        )
    return parts


def run_part(part: Part, directory: Path, kills: int) -> dict[str, Any]:
    """What one process has found: rows, failed tests, seconds, and what it ran on."""
    directory.mkdir()
    rows, report, log = directory / "rows.jsonl", directory / "report.xml", directory / "log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LORA_JOBS_FAULTS")}
    environment["LORA_JOBS_FAULTS_PART"] = f"{part.index}/{part.count}"
    if part.section.is_long:
        environment |= {
            "LORA_JOBS_FAULTS": "long",
            "LORA_JOBS_FAULTS_ROWS": str(rows),
            "LORA_JOBS_FAULTS_KILLS": f"{kills}",
        }
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={directory / 'work'}",
        f"--junitxml={report}", *part.section.arguments, *part.section.paths,
    ]  # fmt: skip
    began = time.monotonic()
    with log.open("w") as output:
        subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=output, check=False)
    seconds = time.monotonic() - began
    said = rows.read_text() if rows.exists() else ""
    for place in (directory, directory.parent, ROOT):  # names of this machine, which say nothing elsewhere
        said = said.replace(f"{place}/", "")
    found = [json.loads(line) for line in said.splitlines()]
    tests, failed, seen = read_tests(report, is_long=part.section.is_long)
    print(f"{part.name}: {tests} tests, {len(failed)} failed, {seconds:.0f} s (log: {log})", flush=True)
    return {
        "tests": tests,
        "failed": failed,
        "seconds": round(seconds, 1),
        "machine": describe_machine(),
        "rows": found + seen,
    }


def read_tests(report: Path, *, is_long: bool) -> tuple[int, list[str], list[dict[str, Any]]]:
    """Out of pytest's JUnit file: how many ran, which failed, and a row for each skipped one and each case on Slurm."""
    tests, failed, rows = 0, [], []
    for case in ElementTree.parse(report).getroot().iter("testcase"):  # noqa: S314 - our own file
        name = case.get("name", "")
        bad = case.find("failure") is not None or case.find("error") is not None
        skipped = case.find("skipped")
        tests += skipped is None
        if bad:
            failed.append(name)
        if skipped is not None and is_long:
            rows.append({"group": "skipped", "case": name, "why": (skipped.get("message") or "")[:200]})
        elif name in ON_SLURM:
            rows.append({"group": "slurm", "case": ON_SLURM[name], "ours": "failed" if bad else "same result"})
    return tests, failed, rows


def describe_machine() -> dict[str, Any]:
    """Date, versions, cores, and how many processes wanted a core on the average of the last quarter of an hour."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "processor": platform.machine(),
        "load": round(os.getloadavg()[2], 1),
        **{name: version(name) for name in PACKAGES},
    }


def load_results() -> dict[str, Any]:
    """The parts that were measured before, by name."""
    return dict(json.loads(RESULTS.read_text())["parts"]) if RESULTS.exists() else {}


def keep(path: Path, results: dict[str, Any], name: str, found: dict[str, Any]) -> None:
    """Write a part's findings to `path` at once; parts of the section that was divided in another way go."""
    section, _, piece = name.partition(":")
    count = piece.partition("/")[2]
    for other in [key for key in results if key.partition(":")[0] == section and key.partition("/")[2] != count]:
        del results[other]
    results[name] = found
    path.write_text(json.dumps({"parts": dict(sorted(results.items()))}, indent=1) + "\n")


def is_divided(results: dict[str, Any], part: Part) -> bool:
    """Whether the section was measured in another number of parts, all of them."""
    counts = [key.partition("/")[2] for key in results if key.partition(":")[0] == part.section.name]
    return bool(counts) and counts[0] != f"{part.count}" and len(counts) == int(counts[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=KILLS, help=f"how often kill -9 ({KILLS})")
    parser.add_argument(
        "--only",
        action="append",
        metavar="SECTION[:I/N]",
        help=f"one of {', '.join(section.name for section in SECTIONS)}, costs, page (repeatable)",
    )
    parser.add_argument("--processes", type=int, default=2, help="pytest processes at a time (2)")
    arguments = parser.parse_args()
    began = time.monotonic()
    results = load_results() if arguments.only else {}
    directory = Path(tempfile.mkdtemp(prefix="lora-jobs-faults-"))
    measured = directory / RESULTS.name
    measured.write_text(json.dumps({"parts": results}))
    parts = list_parts(arguments.only)
    with ThreadPoolExecutor(arguments.processes) as pool:
        jobs = [pool.submit(run_part, part, directory / f"{n}", arguments.kills) for n, part in enumerate(parts)]
        for part, job in zip(parts, jobs, strict=True):
            keep(measured, results, part.name, job.result())
    empty = {"machine": describe_machine(), "failed": [], "rows": []}
    if not arguments.only or "costs" in arguments.only:
        keep(measured, results, "costs", {**empty, "costs": measure_costs()})
    seconds = round(time.monotonic() - began, 1)
    if not arguments.only:
        keep(measured, results, "whole", {**empty, "seconds": seconds})
    missing = [part.name for part in list_parts(None) if part.name not in results and not is_divided(results, part)]
    misses = find_misses(results, missing)
    print(*misses, sep="\n")
    print(f"{seconds:.0f} s")
    if misses:
        print(f"nothing was published: see the lines above; what was measured is in {measured}")
        return 1
    RESULTS.write_text(json.dumps({"parts": dict(sorted(results.items()))}, indent=1) + "\n")
    print(write_pages(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
