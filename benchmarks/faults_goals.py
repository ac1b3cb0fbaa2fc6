"""What `make faults` has to show before its results are kept: the figures of the run against what is promised."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

SAVE_STEPS = 2
KILLS = 300
LONGEST_SECONDS = 3600.0
SHORT_SECONDS = 480.0

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Figures:
    """The figures that matter, from the rows of a run; None where nothing was measured for one."""

    resumes: int
    wrong: int
    with_good: int
    fell_back: int
    hung: int
    states: int | None
    kills: int | None
    kill_runs: int
    kill_runs_same: int
    launcher_kills: int
    shell_kills: int
    ended_by_launcher: int
    lost_by_kill: int | None
    signals: int
    lost_by_signal: int | None
    commit_percent: float | None
    seconds_to_first_step: float | None
    short_seconds: float | None
    whole_seconds: float | None


@dataclass(frozen=True)
class Goal:
    """One promise, in words, and whether the figures keep it."""

    words: str
    is_met: Callable[[Figures], bool]
    shown: Callable[[Figures], str]


GOALS = (
    Goal("no silent wrong resume", lambda f: f.wrong == 0 < f.resumes, lambda f: f"{f.wrong} in {f.resumes}"),
    Goal(
        "falls back wherever an older good one exists",
        lambda f: f.fell_back == f.with_good > 0,
        lambda f: f"{f.fell_back} of {f.with_good}",
    ),
    Goal("no hang", lambda f: f.hung == 0, lambda f: f"{f.hung}"),
    Goal("crash states replayed", lambda f: (f.states or 0) > 0, lambda f: f"{f.states}"),
    Goal(f"{KILLS} kills or more", lambda f: (f.kills or 0) >= KILLS, lambda f: f"{f.kills}"),
    Goal(
        "the launcher and the batch shell among them",
        lambda f: min(f.launcher_kills, f.shell_kills) > 0,
        lambda f: f"{f.launcher_kills} and {f.shell_kills}",
    ),
    Goal(
        "every killed run ends with the adapter of the uninterrupted one",
        lambda f: f.kill_runs_same == f.kill_runs > 0,
        lambda f: f"{f.kill_runs_same} of {f.kill_runs}",
    ),
    Goal(
        f"kill -9 loses at most one save interval ({SAVE_STEPS} steps)",
        lambda f: f.lost_by_kill is not None and f.lost_by_kill <= SAVE_STEPS,
        lambda f: f"{f.lost_by_kill}",
    ),
    Goal("a signal loses no step", lambda f: f.lost_by_signal == 0, lambda f: f"{f.lost_by_signal}"),
    Goal(
        "a commit every 5 minutes takes less than 1 % of the training time",
        lambda f: f.commit_percent is not None and 0 < f.commit_percent < 1,
        lambda f: f"{f.commit_percent} %",
    ),
    Goal(
        "the short form takes less than 8 minutes",
        lambda f: f.short_seconds is not None and f.short_seconds < SHORT_SECONDS,
        lambda f: f"{f.short_seconds} s",
    ),
    Goal(
        "make faults takes less than an hour",
        lambda f: f.whole_seconds is not None and f.whole_seconds < LONGEST_SECONDS,
        lambda f: f"{f.whole_seconds} s",
    ),
)


def collect_rows(results: dict[str, Any]) -> Rows:
    return [row for part in results.values() for row in part["rows"]]


def find_costs(results: dict[str, Any]) -> dict[str, Any]:
    return dict(results.get("costs", {}).get("costs", {}))


def count_figures(results: dict[str, Any]) -> Figures:
    """The figures of all parts together."""
    rows = collect_rows(results)
    kills = [row for row in rows if row["group"] == "kill"]
    signals = [row for row in rows if row["group"] in ("signal", "every step")]
    with_good = [row for row in rows if row["group"] in ("damage", "full disk") and row.get("good_one_exists")]
    prefixes = [row["states"] for row in rows if row["group"] == "crash prefix"]
    returns = [row["seconds_to_first_step"] for row in rows if "seconds_to_first_step" in row]
    return Figures(
        resumes=count_resumes(rows),
        wrong=sum(is_wrong(row) for row in rows),
        with_good=len(with_good),
        fell_back=sum(row["ours"] == "fell back" for row in with_good),
        hung=sum(bool(row.get("hung")) or str(row.get("ours", "")).startswith("hung") for row in rows),
        states=sum(prefixes) if prefixes else None,
        kills=sum(row["kills"] for row in kills) if kills else None,
        kill_runs=len(kills),
        kill_runs_same=sum(row["ours"] == "same result" for row in kills),
        launcher_kills=sum(row["kills"] for row in kills if row.get("victim") == "launcher"),
        shell_kills=sum(row["kills"] for row in kills if row.get("victim") == "batch shell"),
        ended_by_launcher=sum(row.get("ended_by_launcher", 0) for row in kills),
        lost_by_kill=max((row["worst_lost_steps"] for row in kills), default=None),
        signals=sum(row.get("interruptions", 1) for row in signals),
        lost_by_signal=max((row["lost_steps"] for row in signals), default=None),
        commit_percent=find_costs(results).get("commit_percent_of_5_minutes"),
        seconds_to_first_step=median(returns) if returns else None,
        short_seconds=sum(part["seconds"] for name, part in results.items() if name.startswith("short:")) or None,
        whole_seconds=results.get("whole", {}).get("seconds"),
    )


def count_resumes(rows: Rows) -> int:
    """Trainings that were started again in these rows and compared with an uninterrupted one."""
    counted = ("damage", "full disk", "control", "signal", "every step", "stall", "slurm", "stop")
    return sum(row.get("interruptions", 1) for row in rows if row["group"] in counted) + sum(
        row["kills"] for row in rows if row["group"] == "kill"
    )


def is_wrong(row: dict[str, Any]) -> bool:
    return any(word in str(row.get("ours")) for word in ("wrong", "other result", "ran the hidden code"))


def find_misses(results: dict[str, Any], missing: list[str]) -> list[str]:
    """Why these results may not be kept, a line each: failed and skipped tests, parts not run, goals not met."""
    figures = count_figures(results)
    return [
        *[f"{name}: failed: {test}" for name, part in results.items() for test in part.get("failed", ())],
        *[
            f"{name}: skipped: {row['case']}: {row['why']}"
            for name, part in results.items()
            for row in part["rows"]
            if row["group"] == "skipped"
        ],
        *[f"{name}: no test ran" for name, part in results.items() if part.get("tests") == 0],
        *[f"{name}: not run" for name in missing],
        *[f"goal missed: {goal.words}: {goal.shown(figures)}" for goal in GOALS if not goal.is_met(figures)],
    ]
