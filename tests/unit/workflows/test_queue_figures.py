"""The README's table of what status and why cost is that of the committed results: `make bench-queue` writes both."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_the_table_is_that_of_the_results():
    program = runpy.run_path(str(ROOT / "benchmarks" / "queue_view.py"))
    results = json.loads((ROOT / "benchmarks/results/queue_view.json").read_text(encoding="utf-8"))
    rows = [program["Row"](**row) for row in results["rows"]]
    shown = (ROOT / "README.md").read_text(encoding="utf-8").partition(program["BEGIN"])[2].partition(program["END"])[0]
    assert shown == program["render_table"](rows, results["growth"], results["goals"])
