"""docs/faults.md and the README's summary out of benchmarks/results/faults.json."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from faults_goals import GOALS, SAVE_STEPS, Figures, Rows, collect_rows, count_figures, find_costs
from readme import README, find_between, replace_between

PAGE = Path(__file__).parents[1] / "docs" / "faults.md"
MARKS = ("<!-- make faults: summary -->\n", "<!-- /make faults: summary -->\n")

HEAD = """# What stops a run, what damages a checkpoint, and what resume does then

Written by `make faults` (`benchmarks/faults.py`): the long form of `tests/faults` and of `tests/cluster`, each case
really run. *Stock* is transformers' Trainer with PEFT, resumed by `trainer.train(resume_from_checkpoint=
get_last_checkpoint(...))`: one process without DeepSpeed ("plain"), two ranks with ZeRO-2 ("zero2"). Each case of
damage starts from a run with two checkpoints, of steps 2 and 4 of 8; the fault is in the newer one, and the older one
is good. "Trained on wrong state": resume ended without an error, and the adapter is not the one of an uninterrupted
run, byte for byte. "Accepted, same result": the training is right, and the broken file (an adapter that DeepSpeed's
resume never reads) stays in a checkpoint that others may use. How the protocol works:
[checkpoints.md](checkpoints.md); what follows a stop: [interruptions.md](interruptions.md).
Nothing of this is written where a test failed or was skipped, a part was not run or a goal (at the end) was missed.
"""


def write_pages(results: dict[str, Any]) -> str:
    """Write both; returns the page."""
    page = render_page(results)
    PAGE.write_text(page, encoding="utf-8")
    text = README.read_text(encoding="utf-8")
    lines = [line for line in render_figures(results) if line[0] in IN_README]
    summary = "\n" + table(("measured (`make faults`)", ""), lines) + "\n"
    if find_between(text, MARKS) != summary:
        README.write_text(replace_between(text, MARKS, summary), encoding="utf-8")
    return page


def render_page(results: dict[str, Any]) -> str:
    """The whole page."""
    rows, costs = collect_rows(results), find_costs(results)
    sections = {
        "Damaged checkpoints": render_damage(rows),
        "Crashes, kills and signals": render_stops(rows),
        "On a real Slurm": render_slurm(rows),
        "Another spec, or other inputs": render_drift(rows),
        "Costs": render_costs(costs),
        "Goals": render_goals(results),
        "What was run": render_parts(results),
    }
    parts = [HEAD, table(("figure", "measured"), render_figures(results))]
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


def render_figures(results: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures that matter; one that nothing was measured for is left out."""
    rows, costs, figures = collect_rows(results), find_costs(results), count_figures(results)
    damaged = [row for row in rows if row["group"] in ("damage", "full disk") and "ours" in row]
    compared = [row for row in damaged if row.get("stock", "not applicable") != "not applicable"]
    code = sum("ran the hidden code" in row["stock"] for row in compared)
    found: list[tuple[str, str]] = []
    if compared:
        stock = count_verdicts(row["stock"].partition(";")[0] for row in compared)
        note = f"; hidden code ran in {code}" if code else ""
        found.append(("damaged checkpoints, stock resume", f"{len(compared)}: {stock}{note}"))
    if damaged:
        found.append(("damaged checkpoints, ours", f"{len(damaged)}: {count_verdicts(row['ours'] for row in damaged)}"))
    found.append(("silent wrong resumes of ours", f"{figures.wrong} in {figures.resumes} resumes"))
    if figures.with_good:
        found.append(("fell back where an older good one exists", f"{figures.fell_back} of {figures.with_good}"))
    found.append(("hangs of ours", render_hangs(figures)))
    if figures.states:
        found.append(("crash states replayed", f"{figures.states}; the last committed checkpoint is chosen in each"))
    losses = []
    if figures.kills:
        who = {"the launcher": figures.launcher_kills, "the batch shell": figures.shell_kills}
        others = ", ".join(f"{count} of {name}" for name, count in who.items() if count)
        note = f" ({others}, the rest of ranks)" if others else ""
        same = f"{figures.kill_runs_same} of {figures.kill_runs}"
        kills = f"{figures.kills} kills{note} in {figures.kill_runs} runs; {same} end with the adapter of the "
        found.append(("kill -9 at random moments", f"{kills}uninterrupted run, byte for byte"))
        losses.append(f"kill -9: {figures.lost_by_kill} steps (a save every {SAVE_STEPS})")
    if figures.signals:
        losses.append(f"a signal ({figures.signals} times): {figures.lost_by_signal} steps")
    if losses:
        found.append(("worst loss", "; ".join(losses)))
    if costs:
        found.append(("commit at a 5-minute interval", render_overhead(costs)))
    if figures.seconds_to_first_step is not None:
        seconds = f"{figures.seconds_to_first_step:.0f} s (median)"
        found.append(("from the start of a requeued attempt to its first step", seconds))
    return found


def render_hangs(figures: Figures) -> str:
    """A rank whose peer is killed before they have met waits for it: then the launcher's rule ends it, not we."""
    if not figures.ended_by_launcher:
        return f"{figures.hung}"
    rule = "30 s after the first failure, srun's 60 s; 10 s here"
    return (
        f"{figures.hung}; in {figures.ended_by_launcher} of the kills the launcher's rule ended the other rank ({rule})"
    )


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
        runs = [row for row in rows if row["group"] == "kill" and row["kind"] == kind and is_of_ranks(row)]
        count = sum(row["one_rank"] if one else row["kills"] - row["one_rank"] for row in runs)
        if count:
            who = "one rank" if one else "all ranks"
            worst = max(row["worst_lost_steps"] for row in runs)
            same = "same result" if all(row["ours"] == "same result" for row in runs) else "other result"
            left = sum(row.get("ended_by_launcher", 0) for row in runs)
            note = f"; the other rank ended by the launcher's rule in {left}" if one and left else ""
            lines.append((f"kill -9 of {who}, {kind} ({count} times)", same, f"at most {worst} steps lost{note}"))
    for victim in dict.fromkeys(row["victim"] for row in rows if row["group"] == "kill" and not is_of_ranks(row)):
        runs = [row for row in rows if row.get("victim") == victim]
        same = "same result" if all(row["ours"] == "same result" for row in runs) else "other result"
        worst = max(row["worst_lost_steps"] for row in runs)
        times = sum(row["kills"] for row in runs)
        lines.append((f"kill -9 of the {victim} ({times} times)", same, f"at most {worst} steps lost"))
    return table(("what happens", "ours", "measured"), lines)


def is_of_ranks(row: dict[str, Any]) -> bool:
    """Whether ranks were killed, and not what starts them."""
    return bool(row.get("victim", "ranks") == "ranks")


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
        (
            "its commit: fsync, hash, manifest, rotation (two ranks, saves by turns with and without one)",
            render_overhead(costs),
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


def render_goals(results: dict[str, Any]) -> str:
    """What was promised beside what was measured: where one is missed, this page is not written."""
    figures = count_figures(results)
    return table(("goal", "measured"), [(goal.words, goal.shown(figures)) for goal in GOALS])


def render_parts(results: dict[str, Any]) -> str:
    """When and with what each part was measured."""
    lines = []
    for name, part in results.items():
        machine = part["machine"]
        seconds = f"{part['seconds']:.0f} s" if "seconds" in part else "measured"
        ran = f"{part['tests']} tests in {seconds}" if "tests" in part else seconds
        where = f"{machine['cores']} cores, load {machine['load']}"
        versions = ", ".join(f"{key} {machine[key]}" for key in ("torch", "transformers", "peft", "deepspeed"))
        lines.append((name, ran, machine["date"], where, versions))
    return table(("part", "result", "date", "machine", "versions"), lines)


def table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """A Markdown table; nothing without lines."""
    if not lines:
        return ""
    marks = tuple("---" for _ in head)
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in (head, marks, *lines)) + "\n"
