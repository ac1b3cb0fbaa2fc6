"""The README's figures are the ones of the committed results and of the program: `make readme` writes them."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))
PROGRAM = runpy.run_path(str(ROOT / "benchmarks" / "readme.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
AGAIN = "the README is older than the results: make readme"


def test_the_accuracy_table_is_that_of_the_results() -> None:
    results = json.loads((ROOT / "benchmarks/results/memory.json").read_text(encoding="utf-8"))
    assert PROGRAM["find_between"](README, PROGRAM["ACCURACY"]) == PROGRAM["render_accuracy"](results), AGAIN


def test_the_screen_is_what_check_prints() -> None:
    """Up to the line that depends on the disk's free space."""
    shown, now = (PROGRAM["find_between"](README, PROGRAM["SCREEN"]), PROGRAM["capture_screen"]())
    assert shown.split("    host memory")[0] == now.split("    host memory")[0], AGAIN


def test_the_published_runs_are_followed_as_closely_as_the_pages_say() -> None:
    found = PROGRAM["compare_published"]()
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert PROGRAM["find_between"](README, PROGRAM["PUBLISHED"]) == PROGRAM["render_summary"](found), AGAIN
    assert PROGRAM["find_between"](page, PROGRAM["PUBLISHED"]) == PROGRAM["render_published"](found), AGAIN
    first, second, ends, _ = found
    assert max(abs(first.percent_of_total), abs(second.percent_of_total)) <= 1
    assert abs(ends.percent) <= 2
