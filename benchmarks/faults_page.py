"""docs/faults.md out of benchmarks/results/faults.json."""

from __future__ import annotations

from typing import Any

HEAD = """# What stops a run, what damages a checkpoint, and what resume does then

Written by `make faults`: the cases of `tests/faults` and `tests/cluster`, each really run. *Stock* is
transformers' Trainer with PEFT, resumed by `trainer.train(resume_from_checkpoint=get_last_checkpoint(...))`: one
process without DeepSpeed ("plain"), two ranks with ZeRO-2 ("zero2"). Each case starts from a run with two checkpoints,
of steps 2 and 4 of 8; the fault is in the newer one, and the older one is good. "Trained on wrong state": resume ended
without an error and the adapter is not the one of an uninterrupted run, byte for byte.
"""


def render_page(document: dict[str, Any]) -> str:
    """The whole page."""
    rows = document["rows"]
    sections = [
        HEAD,
        render_summary(document),
        "## Damaged checkpoints\n\n" + render_damage(rows),
        "## Crashes, kills and signals\n\n" + render_stops(rows),
        "## On a real Slurm\n\n" + render_slurm(rows),
        "## Costs\n\n" + render_costs(document["costs"]),
        render_machine(document),
    ]
    return "\n".join(section for section in sections if section)


def render_summary(document: dict[str, Any]) -> str:
    found = document["summary"]
    stock = ", ".join(f"{count} {verdict}" for verdict, count in sorted(found["stock"].items()))
    ours = ", ".join(f"{count} {verdict}" for verdict, count in sorted(found["ours"].items()))
    lines = [
        ("stock resume", f"{found['compared_with_stock']} damaged checkpoints: {stock}"),
        ("ours", f"{found['damaged_checkpoints']} damaged checkpoints: {ours}"),
        ("silent wrong resumes of ours", f"{found['ours_silent_wrong_resumes']}"),
        ("fell back where a good one exists", f"{found['ours_fall_back_percent']} %"),
        ("hangs of ours", f"{found['ours_hangs']}"),
        ("crash states replayed", f"{found['crash_states']}; the last committed checkpoint is chosen in each"),
        (
            "kill -9 at random moments",
            f"{found['kills']} kills in {found['killed_runs']} runs; {found['killed_runs_same_result']} of them end "
            "with the adapter of the uninterrupted run",
        ),
        (
            "worst loss",
            f"kill -9: {found['worst_lost_steps_kill']} steps (a save every {found['save_interval_steps']}); "
            f"a signal ({found['signals']} times): {found['worst_lost_steps_signal']} steps",
        ),
    ]
    return table(("figure", "measured"), lines)


def render_damage(rows: list[dict[str, Any]]) -> str:
    lines = [
        (row["case"], row.get("kind", ""), row.get("stock", ""), row["ours"])
        for row in rows
        if row["group"] in ("control", "damage", "full disk")
    ]
    return table(("fault in the newest checkpoint", "training", "stock resume", "ours"), lines)


def render_stops(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        if row["group"] == "crash prefix":
            lines.append((f"crash: {row['case']}", row["ours"], f"{row['states']} states"))
        elif row["group"] in ("signal", "every step", "stall"):
            times = row.get("interruptions", 1)
            lost = f"{row['lost_steps']} steps lost" if "lost_steps" in row else ""
            lines.append(
                (f"{row['group']}: {row['case']}" + (f" ({times} times)" if times > 1 else ""), row["ours"], lost)
            )
        elif row["group"] == "drift":
            lines.append((f"drift: {row['case']}", row["ours"], row.get("stock", "")))
    return table(("what happens", "ours", "measured"), lines)


def render_slurm(rows: list[dict[str, Any]]) -> str:
    lines = [
        (row["case"], row["ours"], f"{row['lost_steps']} steps repeated" if "lost_steps" in row else "")
        for row in rows
        if row["group"] == "slurm"
    ]
    return table(("what happens", "ours", "measured"), lines)


def render_costs(costs: dict[str, Any]) -> str:
    if not costs:
        return ""
    lines = [
        ("checkpoint", f"{costs['bytes'] / 1e6:.0f} MB over two ranks"),
        ("bare save, as Trainer and DeepSpeed do it", f"{costs['save_seconds']:.2f} s"),
        (
            "commit after it: fsync, hash, manifest (one process for both ranks)",
            f"{costs['commit_seconds']:.2f} s, {costs['commit_percent_of_5_minutes']:.2f} % of a 5-minute interval",
        ),
        ("verify: sizes", f"{costs['verify_0_seconds'] * 1000:.1f} ms"),
        ("verify: structure, checksums, pickles", f"{costs['verify_1_seconds']:.2f} s"),
        (
            "verify: hashes, from a cold cache",
            f"{costs['verify_2_seconds']:.2f} s, {costs['verify_gb_per_second']:.2f} GB/s; plain reading "
            f"{costs['read_gb_per_second']:.2f} GB/s",
        ),
    ]
    return table(("cost", "measured"), lines)


def render_machine(document: dict[str, Any]) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in document["machine"].items())
    failed = document["failed"]
    note = f"\nTests that failed in this run: {failed}.\n" if failed else ""
    return f"Measured with: {machine}.\n{note}"


def table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    marks = tuple("---" for _ in head)
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in (head, marks, *lines)) + "\n"
