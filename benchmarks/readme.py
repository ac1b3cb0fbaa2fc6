"""The README's screen of `check`, its accuracy table, and what published runs say of the estimate, here and in
docs/memory.md: `make readme`. All stand between markers and are replaced.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from published_memory import compare_published, render_published, render_summary

from lora_jobs.sizing import find_shape

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
MEMORY_PAGE = ROOT / "docs" / "memory.md"
RESULTS = ROOT / "benchmarks" / "results" / "memory.json"
DISK = "warning: 4 checkpoints and the adapter"
SPEC = "jobs/gemma2_9b_svg.yaml"
ACCURACY = ("<!-- make readme: accuracy -->\n", "<!-- /make readme: accuracy -->\n")
PUBLISHED = ("<!-- make readme: published -->\n", "<!-- /make readme: published -->\n")
SCREEN = ("<!-- make readme: check -->\n", "<!-- /make readme: check -->\n")


def capture_screen() -> str:
    """What `check` prints for the example job into a pipe, from an empty runs folder; the home directory as ~, and
    without a warning of this machine's disk, the last there is.
    """
    with tempfile.TemporaryDirectory() as runs:
        argv = [sys.executable, "-m", "lora_jobs", "check", SPEC, "--set", "resources.account=MY_PROJECT"]
        done = subprocess.run(
            argv,
            cwd=ROOT,
            env={**os.environ, "LORA_JOBS_HOME": runs},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
    printed = done.stdout.split(DISK)[0].replace(str(Path.home()), "~")
    shown = ["$ lora-jobs " + " ".join(argv[3:]), *(line.rstrip() for line in printed.splitlines())]
    return "\n" + "".join(f"    {line}".rstrip() + "\n" for line in shown) + "\n"


def render_accuracy(results: dict[str, Any]) -> str:
    """Rows, mean and worst difference between the estimate's and the trace's allocated peak, by family."""
    families: dict[str, list[float]] = {}
    for name, row in results["rows"].items():
        families.setdefault(find_shape(name.split()[0]).family, []).append(abs(row["error_percent"]))
    lines = ["| family | rows | mean | worst |", "|---|---|---|---|"]
    total = [error for errors in families.values() for error in errors]
    for family, errors in [*sorted(families.items()), ("all", total)]:
        lines.append(f"| {family} | {len(errors)} | {statistics.mean(errors):.2f} % | {max(errors):.2f} % |")
    return "\n" + "\n".join(lines) + "\n\n"


def replace_between(text: str, marks: tuple[str, str], content: str) -> str:
    before, rest = text.split(marks[0])
    return before + marks[0] + content + marks[1] + rest.split(marks[1])[1]


def find_between(text: str, marks: tuple[str, str]) -> str:
    return text.split(marks[0])[1].split(marks[1])[0]


def main() -> None:
    text = README.read_text(encoding="utf-8")
    text = replace_between(text, ACCURACY, render_accuracy(json.loads(RESULTS.read_text(encoding="utf-8"))))
    text = replace_between(text, SCREEN, capture_screen())
    found = compare_published()
    README.write_text(replace_between(text, PUBLISHED, render_summary(found)), encoding="utf-8")
    page = MEMORY_PAGE.read_text(encoding="utf-8")
    MEMORY_PAGE.write_text(replace_between(page, PUBLISHED, render_published(found)), encoding="utf-8")


if __name__ == "__main__":
    main()
