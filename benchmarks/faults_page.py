"""docs/faults.md and the README's summary out of benchmarks/results/faults.json."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from readme import README, find_between, replace_between

PAGE = Path(__file__).parents[1] / "docs" / "faults.md"
MARKS = ("<!-- make faults: summary -->\n", "<!-- /make faults: summary -->\n")
SAVE_STEPS = 2

HEAD = """# What stops a run, what damages a checkpoint, and what resume does then

Written by `make faults` (`benchmarks/faults.py`): the long form of `tests/faults` and of `tests/cluster`, each case
really run. *Stock* is transformers' Trainer with PEFT, resumed by `trainer.train(resume_from_checkpoint=
get_last_checkpoint(...))`: one process without DeepSpeed ("plain"), two ranks with ZeRO-2 ("zero2"). Each case of
damage starts from a run with two checkpoints, of steps 2 and 4 of 8; the fault is in the newer one, and the older one
is good. "Trained on wrong state": resume ended without an error, and the adapter is not the one of an uninterrupted
run, byte for byte. "Accepted, same result": the training is right, and the broken file (an adapter that DeepSpeed's
resume never reads) stays in a checkpoint that others may use. How the protocol works:
[checkpoints.md](checkpoints.md); what follows a stop: [interruptions.md](interruptions.md).
"""

Rows = list[dict[str, Any]]


def write_pages(results: dict[str, Any], missing: list[str]) -> str:
    """Write both; returns the page. `missing`: the parts of the long form that were not run yet."""
    page = render_page(results, missing)
    PAGE.write_text(page, encoding="utf-8")
    text = README.read_text(encoding="utf-8")
    lines = [line for line in render_figures(collect_rows(results), find_costs(results)) if line[0] in IN_README]
    summary = "\n" + table(("measured (`make faults`)", ""), lines) + "\n"
    if find_between(text, MARKS) != summary:
        README.write_text(replace_between(text, MARKS, summary), encoding="utf-8")
    return page


def collect_rows(results: dict[str, Any]) -> Rows:
    return [row for part in results.values() for row in part["rows"]]


def find_costs(results: dict[str, Any]) -> dict[str, Any]:
    return dict(results.get("costs", {}).get("costs", {}))


def render_page(results: dict[str, Any], missing: list[str]) -> str:
    """The whole page."""
    rows, costs = collect_rows(results), find_costs(results)
    sections = {
        "Damaged checkpoints": render_damage(rows),
        "Crashes, kills and signals": render_stops(rows),
        "On a real Slurm": render_slurm(rows),
        "Another spec, or other inputs": render_drift(rows),
        "Costs": render_costs(costs),
        "What was run": render_parts(results, missing),
    }
    parts = [HEAD, table(("figure", "measured"), render_figures(rows, costs))]
    return "\n".join(parts + [f"## {title}\n\n{text}" for title, text in sections.items() if text])


IN_README = (
    "damaged checkpoints, stock resume",
    "damaged checkpoints, ours",
    "silent wrong resumes of ours",
    "fell back where an older good one exists",
    "hangs of ours",
    "kill -9 at random moments",
    "worst loss",
    "commit at a 5-minute interval",
)


def render_figures(rows: Rows, costs: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures that matter; one that nothing was measured for is left out."""
    damaged = [row for row in rows if row["group"] in ("damage", "full disk") and "ours" in row]
    compared = [row for row in damaged if row.get("stock", "not applicable") != "not applicable"]
    with_good = [row for row in damaged if row.get("good_one_exists")]
    back = sum(row["ours"] == "fell back" for row in with_good)
    kills = [row for row in rows if row["group"] == "kill"]
    signals = [row for row in rows if row["group"] in ("signal", "every step")]
    prefixes = [row for row in rows if row["group"] == "crash prefix"]
    returns = [row["seconds_to_first_step"] for row in rows if "seconds_to_first_step" in row]
    code = sum("ran the hidden code" in row["stock"] for row in compared)
    found: list[tuple[str, str]] = []
    if compared:
        stock = count_verdicts(row["stock"].partition(";")[0] for row in compared)
        note = f"; hidden code ran in {code}" if code else ""
        found.append(("damaged checkpoints, stock resume", f"{len(compared)}: {stock}{note}"))
    if damaged:
        found.append(("damaged checkpoints, ours", f"{len(damaged)}: {count_verdicts(row['ours'] for row in damaged)}"))
    found += [
        ("silent wrong resumes of ours", f"{sum(is_wrong(row) for row in rows)} in {count_resumes(rows)} resumes"),
        *([("fell back where an older good one exists", f"{back} of {len(with_good)}")] if with_good else []),
        (
            "hangs of ours",
            f"{sum(bool(row.get('hung')) or str(row.get('ours', '')).startswith('hung') for row in rows)}",
        ),
    ]
    if prefixes:
        states = sum(row["states"] for row in prefixes)
        found.append(("crash states replayed", f"{states}; the last committed checkpoint is chosen in each"))
    if kills:
        same = sum(row["ours"] == "same result" for row in kills)
        found.append(
            (
                "kill -9 at random moments",
                f"{sum(row['kills'] for row in kills)} kills in {len(kills)} runs; {same} of {len(kills)} end with the "
                "adapter of the uninterrupted run, byte for byte",
            )
        )
    if kills or signals:
        losses = []
        if kills:
            worst = max(row["worst_lost_steps"] for row in kills)
            losses.append(f"kill -9: {worst} steps (a save every {SAVE_STEPS})")
        if signals:
            times = sum(row.get("interruptions", 1) for row in signals)
            losses.append(f"a signal ({times} times): {max(row['lost_steps'] for row in signals)} steps")
        found.append(("worst loss", "; ".join(losses)))
    if costs:
        found.append(("commit at a 5-minute interval", render_overhead(costs)))
    if returns:
        found.append(("from the start of a requeued attempt to its first step", f"{median(returns):.0f} s (median)"))
    return found


def count_resumes(rows: Rows) -> int:
    """Trainings that were started again in these rows and compared with an uninterrupted one."""
    counted = ("damage", "full disk", "control", "signal", "every step", "stall", "slurm", "stop")
    return sum(row.get("interruptions", 1) for row in rows if row["group"] in counted) + sum(
        row["kills"] for row in rows if row["group"] == "kill"
    )


def is_wrong(row: dict[str, Any]) -> bool:
    return any(word in str(row.get("ours")) for word in ("wrong", "other result", "ran the hidden code"))


def count_verdicts(verdicts: Any) -> str:
    return ", ".join(f"{count} {verdict}" for verdict, count in Counter(verdicts).most_common())


def render_overhead(costs: dict[str, Any]) -> str:
    return (
        f"{costs['commit_percent_of_5_minutes']:.2f} % of the training time: {costs['commit_seconds']:.2f} s for "
        f"{costs['bytes'] / 1e6:.0f} MB"
    )


def render_damage(rows: Rows) -> str:
    lines = [
        (row["case"], row.get("kind", ""), row.get("stock", ""), row["ours"])
        for row in sorted(rows, key=lambda row: (row["group"], "committed:" in row["case"], row["case"]))
        if row["group"] in ("control", "damage", "full disk")
    ]
    return table(("fault in the newest checkpoint", "training", "stock resume", "ours"), lines)


def render_stops(rows: Rows) -> str:
    lines = []
    for row in rows:
        if row["group"] == "crash prefix":
            lines.append((f"crash: {row['case']}", row["ours"], f"{row['states']} states"))
        elif row["group"] in ("signal", "every step", "stall", "stop"):
            times = row.get("interruptions", 1)
            lost = f"{row['lost_steps']} steps lost" if "lost_steps" in row else ""
            what = f"{row['group']}: {row['case']}" + (f" ({times} times)" if times > 1 else "")
            lines.append((what, row["ours"], lost))
    for kind, one in ((kind, one) for kind in ("plain", "ddp", "zero2") for one in (True, False)):
        runs = [row for row in rows if row["group"] == "kill" and row["kind"] == kind]
        count = sum(row["one_rank"] if one else row["kills"] - row["one_rank"] for row in runs)
        if count:
            who = "one rank" if one else "all ranks"
            worst = max(row["worst_lost_steps"] for row in runs)
            same = "same result" if all(row["ours"] == "same result" for row in runs) else "other result"
            left = sum(row.get("ended_by_launcher", 0) for row in runs)
            note = f"; the other rank ended by the launcher's rule in {left}" if one and left else ""
            lines.append((f"kill -9 of {who}, {kind} ({count} times)", same, f"at most {worst} steps lost{note}"))
    return table(("what happens", "ours", "measured"), lines)


def render_slurm(rows: Rows) -> str:
    lines = []
    for row in rows:
        if row["group"] == "slurm":
            lost = f"{row['lost_steps']} steps repeated" if "lost_steps" in row else ""
            back = (
                f"first step {row['seconds_to_first_step']:.0f} s after the start"
                if "seconds_to_first_step" in row
                else ""
            )
            lines.append((row["case"], row["ours"], "; ".join(filter(None, (lost, back)))))
    return table(("what happens", "ours", "measured"), lines)


def render_drift(rows: Rows) -> str:
    lines = [(row["case"], row.get("stock", ""), row["ours"]) for row in rows if row["group"] == "drift"]
    return table(("what differs at the resume", "stock resume", "ours"), lines)


def render_costs(costs: dict[str, Any]) -> str:
    if not costs:
        return ""
    lines = [
        ("checkpoint", f"{costs['bytes'] / 1e6:.0f} MB over two ranks"),
        ("bare save, as Trainer and DeepSpeed do it", f"{costs['save_seconds']:.2f} s"),
        ("commit after it: fsync, hash, manifest, rotation (one process for both ranks)", render_overhead(costs)),
        ("verify: sizes", f"{costs['verify_0_seconds'] * 1000:.1f} ms"),
        ("verify: structure, checksums, pickles", f"{costs['verify_1_seconds']:.2f} s"),
        (
            "verify: hashes, from a cold cache",
            f"{costs['verify_2_seconds']:.2f} s, {costs['verify_gb_per_second']:.2f} GB/s; plain reading "
            f"{costs['read_gb_per_second']:.2f} GB/s",
        ),
    ]
    return table(("cost", "measured"), lines)


def render_parts(results: dict[str, Any], missing: list[str]) -> str:
    """When and with what each part was measured, and what is still to be run."""
    lines = []
    for name, part in results.items():
        machine = part["machine"]
        failed = f", **failed: {', '.join(part['failed'])}**" if part["failed"] else ""
        ran = f"{part['tests']} tests in {part['seconds']:.0f} s{failed}" if "tests" in part else "measured"
        where = f"{machine['cores']} cores, load {machine['load']}"
        versions = ", ".join(f"{key} {machine[key]}" for key in ("torch", "transformers", "peft", "deepspeed"))
        lines.append((name, ran, machine["date"], where, versions))
    counts = Counter(name.partition(":")[0] for name in missing)
    totals = {name.partition(":")[0]: name.partition("/")[2] for name in missing}
    words = ", ".join(f"{section} ({count} of {totals[section]} parts)" for section, count in counts.items())
    left = f"\nOf the long form not run yet: {words}.\n" if missing else ""
    return table(("part", "result", "date", "machine", "versions"), lines) + left


def table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """A Markdown table; nothing without lines."""
    if not lines:
        return ""
    marks = tuple("---" for _ in head)
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in (head, marks, *lines)) + "\n"
