"""What `status` and `why` cost over the raw squeue and sprio, with a long queue and with many run directories.

`make bench-queue` (as root: it starts the tests' Slurm) prints the tables, writes results/queue_view.json and the table
of the README, and says which goals hold; `--where-possible` is content where no Slurm can be started, and says why.
Each pair is measured in turn in one run: ours, then what it stands beside, squeue alone for `status` (which asks no
sprio), squeue and sprio for `why` and `status JOB`. Our own share is the median of the pairs' differences, the ratio
the median of their ratios. "least" is the fastest of ours less the fastest of the raw calls: what is left where other
programs of a busy machine got in the way least. A quarter of the jobs could start and stand before ours. Memory is the
highest resident set of the process (without Slurm's own commands), from wait4. The processor time (user and system,
Slurm's commands that ours starts included) says what the clock would on a machine that does nothing else. Our modules
are byte-compiled first, as an installed package's are.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results" / "queue_view.json"
sys.path.insert(0, str(ROOT / "tests" / "cluster"))

from slurm_cluster import ACCOUNT, SlurmCluster, find_missing, wait_until  # noqa: E402

from lora_jobs.cluster.parsers import QUEUE_FORMAT, SPRIO_FORMAT  # noqa: E402
from lora_jobs.runs import Submission, append_submission, create_run  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Sequence

SIZES = (100, 1_000, 10_000)
USERS = ("root", "daemon", "bin", "games")
AHEAD = "daemon"
PAIRS = int(os.environ.get("BENCH_PAIRS", "7"))
RUNS = 10_000
SHARE_GOAL, RUNS_GOAL, MEMORY_GOAL = 0.4, 0.5, 150
"""Seconds over the raw calls before the longest queue, the same with that many run directories, and MB."""

README = ROOT / "README.md"
BEGIN, END = "<!-- make bench-queue -->\n", "<!-- /make bench-queue -->\n"
SQUEUE = ("squeue", "-h", "--states=all", "-o", QUEUE_FORMAT)
SPRIO = ("sprio", "-h", "-o", SPRIO_FORMAT)
FILES = {"spec.yaml": "name: a\n", "script.sbatch": "#SBATCH --time=00:10:00\n"}


@dataclass(frozen=True, slots=True)
class Row:
    """One command beside the raw calls: medians in seconds, our share (of medians, of the fastest), MiB."""

    what: str
    pending: int
    run_directories: int
    seconds: float
    raw: dict[str, float]
    raw_seconds: float
    share_seconds: float
    least_seconds: float
    least_raw_seconds: float
    ratio: float
    memory_mib: float
    cpu_seconds: float
    raw_cpu_seconds: float


class LongQueue(SlurmCluster):
    """The tests' cluster with room for ten thousand jobs."""

    def _write_files(self) -> None:
        super()._write_files()
        with self.slurm_conf.open("a") as file:
            file.write("MaxArraySize=20001\nMaxJobCount=50000\n")


def run_measured(argv: Sequence[str], environment: dict[str, str]) -> tuple[float, float, float]:
    """Seconds, MiB and processor seconds of one command, its output thrown away."""
    start = time.perf_counter()
    process = subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    assert process.stderr is not None
    words = process.stderr.read().decode()
    process.stderr.close()
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, words
    return seconds, usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime


def measure(what: str, words: Sequence[str], raw: Sequence[Sequence[str]], pending: int, runs: int,
            environment: dict[str, str]) -> Row:  # fmt: skip
    """Ours and the raw calls in turn, once to warm up and then PAIRS times."""
    argv = [sys.executable, "-m", "lora_jobs", *words]
    pairs = []
    calls: dict[str, list[float]] = {call[0]: [] for call in raw}
    memory = 0.0
    for number in range(PAIRS + 1):
        ours, used, cpu = run_measured(argv, environment)
        answers = [run_measured(call, environment) for call in raw]
        memory = max(memory, used)
        if number:
            pairs.append((ours, sum(answer[0] for answer in answers), cpu, sum(answer[2] for answer in answers)))
            for call, answer in zip(raw, answers, strict=True):
                calls[call[0]].append(answer[0])
    ours, theirs, cpu, raw_cpu = (statistics.median(side) for side in zip(*pairs, strict=True))
    share = statistics.median(pair[0] - pair[1] for pair in pairs)
    least, least_raw = (min(side) for side in list(zip(*pairs, strict=True))[:2])
    ratio = statistics.median(pair[0] / pair[1] for pair in pairs)
    apart = {name: round(statistics.median(seconds), 3) for name, seconds in calls.items()}
    row = Row(
        what, pending, runs, round(ours, 3), apart, round(theirs, 3), round(share, 3), round(least, 3),
        round(least_raw, 3), round(ratio, 2), round(memory), round(cpu, 3), round(raw_cpu, 3),
    )  # fmt: skip
    named = " + ".join(f"{name} {seconds:.3f} s" for name, seconds in apart.items())
    print(
        f"{what:20} {pending:5} pending {runs:5} runs  {row.seconds:.3f} s, {named}, share "
        f"{row.share_seconds:.3f} s (least {least - least_raw:.3f} s)  {row.memory_mib:.0f} MiB  "
        f"processor {row.cpu_seconds:.2f} s, raw {row.raw_cpu_seconds:.2f} s",
        flush=True,
    )
    return row


def fill_queue(cluster: SlurmCluster, number: int, have: int, script: Path) -> None:
    """Arrays of several users, their tasks split into jobs of their own: squeue prints a row for each.

    All are held but those of one user, which wait for the full partition with a priority above ours.
    """
    each = (number - have) // len(USERS)
    for user in USERS:
        hold, nice = ([], -50_000) if user == AHEAD else (["--hold"], 1)
        options = [f"--uid={user}", f"--account={ACCOUNT}", "--chdir=/", "--output=/dev/null", "--gpus-per-node=1"]
        job_id = cluster.call(
            "sbatch", "--parsable", *hold, f"--array=0-{each}", "--time=10", *options, str(script)
        ).stdout.strip()
        cluster.call("scontrol", "update", f"JobId={job_id}_[0-{each - 1}]", f"Nice={nice}", timeout=300)


def make_runs(home: Path, number: int, job_id: str) -> None:
    """Run directories, the newest of them with the job that waits."""
    have = sum(1 for _ in home.iterdir()) if home.exists() else 0
    for index in range(have + 1, number + 1):
        run = create_run(home, f"a-{index}", FILES) if index in (1, number) else None
        if run is None:  # the same, without an fsync per file
            directory = home / f"a-{index}"
            (directory / "logs").mkdir(parents=True)
            (directory / "checkpoints").mkdir()
            for name, text in FILES.items():
                (directory / name).write_text(text)
            line = {"job_id": str(5_000_000 + index), "backend": "local", "submitted_at": 1.0, "host": "here"}
            (directory / "submissions.jsonl").write_text(json.dumps(line) + "\n")
        else:
            append_submission(run, Submission(job_id, "slurm", time.time(), "here"))
    os.sync()  # or the disk is busy with these while the commands are measured


def count_pending(cluster: SlurmCluster) -> int:
    return len(cluster.call("squeue", "-h", "-t", "PD", "-o", "%i").stdout.split())


def measure_queue(cluster: SlurmCluster, directory: Path) -> list[Row]:
    script = directory / "job.sh"
    script.write_text("#!/bin/bash\nsleep 3000\n")
    for user in USERS[1:]:
        cluster.call("sacctmgr", "-i", "add", "user", user, f"account={ACCOUNT}")
    home = directory / "runs"
    environment = {**cluster.environment, "LORA_JOBS_HOME": str(home), "SLURM_CONF": str(cluster.slurm_conf)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment["PYTHONPYCACHEPREFIX"] = str(directory / "bytecode")
    submit = ("sbatch", "--parsable", "--output=/dev/null", "--gpus-per-node=4", "--nodes=2", "--time=30", str(script))
    running = cluster.call(*submit).stdout.strip()
    wait_until(lambda: "RUNNING" in cluster.call("squeue", "-h", "-j", running, "-o", "%T").stdout, "it", cluster.root)
    mine = cluster.call(*submit).stdout.strip()
    make_runs(home, 1, mine)
    asks_sprio = {"why JOB": ["why", mine], "status JOB": ["status", mine]}
    rows = []
    for size in SIZES:
        have = count_pending(cluster)
        fill_queue(cluster, size, have, script)
        pending = count_pending(cluster)
        rows.append(measure("status", ["status"], [SQUEUE], pending, 1, environment))
        rows += [measure(what, words, [SQUEUE, SPRIO], pending, 1, environment) for what, words in asks_sprio.items()]
        print(f"ahead of ours: {count_ahead(mine, environment)} jobs", flush=True)
    make_runs(home, RUNS, mine)
    rows.append(measure("status", ["status"], [SQUEUE], pending, RUNS, environment))
    rows.append(measure("why JOB", ["why", mine], [SQUEUE, SPRIO], pending, RUNS, environment))
    rows.append(measure("status OLDEST JOB ID", ["status", "5000002"], [SQUEUE], pending, RUNS, environment))
    return rows


def count_ahead(job_id: str, environment: dict[str, str]) -> int:
    """Jobs that `why` counts before ours: as many as a quarter of the queue, or the sums are not measured."""
    argv = [sys.executable, "-m", "lora_jobs", "why", job_id, "--json"]
    done = subprocess.run(argv, env=environment, stdout=subprocess.PIPE, check=True)
    answer = json.loads(done.stdout)
    ahead = answer["rank"] - 1
    assert 0.2 < ahead / answer["pending_jobs"] < 0.3, answer
    return int(ahead)


def measure_growth(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """From the shortest to the longest queue: what our share grows by, and the raw calls beside it, in seconds."""
    found: list[dict[str, Any]] = []
    for what in dict.fromkeys(row.what for row in rows if row.run_directories == 1):
        first, *_, last = [row for row in rows if row.what == what and row.run_directories == 1]
        growth = {
            "what": what,
            "pending": [first.pending, last.pending],
            "share_seconds": round(last.share_seconds - first.share_seconds, 3),
            "raw_seconds": round(last.raw_seconds - first.raw_seconds, 3),
            "least_seconds": round(last.least_seconds - first.least_seconds, 3),
            "least_raw_seconds": round(last.least_raw_seconds - first.least_raw_seconds, 3),
            "cpu_seconds": round(last.cpu_seconds - first.cpu_seconds, 3),
            "raw_cpu_seconds": round(last.raw_cpu_seconds - first.raw_cpu_seconds, 3),
        }
        print("growth", json.dumps(growth))
        found.append(growth)
    return found


def check_goals(rows: Sequence[Row], growth: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals, what was measured, and whether they hold; a machine that is busy misses some."""
    longest = max(row.pending for row in rows)
    found: list[tuple[str, float, bool]] = []
    for row in rows:
        if row.what in ("status", "why JOB") and row.pending == longest and row.run_directories == 1:
            goal = f"{row.what}: at most {SHARE_GOAL} s over {' and '.join(row.raw)} before {longest} jobs"
            found.append((goal, row.share_seconds, row.share_seconds <= SHARE_GOAL))
        if row.what == "status" and row.run_directories == RUNS:
            goal = f"status: at most {RUNS_GOAL} s over squeue with {RUNS} run directories"
            found.append((goal, row.share_seconds, row.share_seconds <= RUNS_GOAL))
    for change in growth:
        if change["what"] in ("status", "why JOB"):
            share, raw = change["share_seconds"], change["raw_seconds"]
            found.append(
                (f"{change['what']}: our share grows by no more than the raw calls ({raw} s)", share, share <= raw)
            )
    most = max(row.memory_mib for row in rows)
    found.append((f"under {MEMORY_GOAL} MB of memory, in MiB", most, most * 1.048576 < MEMORY_GOAL))
    for goal, measured, holds in found:
        print(f"{'holds' if holds else 'MISSED'}: {goal}: {measured}")
    return [{"goal": goal, "measured": measured, "holds": holds} for goal, measured, holds in found]


def render_table(rows: Sequence[Row], growth: Sequence[dict[str, Any]], goals: Sequence[dict[str, Any]]) -> str:
    """The README's table: what each command took, and of it our own share; its growth, and which goals hold."""
    commands = ("status", "why JOB", "status JOB")
    lines = [
        "| pending jobs | `squeue` | `sprio` | " + " | ".join(f"`{name}`, our share" for name in commands) + " |",
        "|---|---|---|---|---|---|",
    ]
    for runs in (1, RUNS):
        for pending in dict.fromkeys(row.pending for row in rows if row.run_directories == runs):
            here = {row.what: row for row in rows if (row.pending, row.run_directories) == (pending, runs)}
            raw = here["why JOB"].raw
            named = f"{pending // 100 * 100:,}" + (f", and {runs:,} run directories" if runs > 1 else "")
            took = [
                f"{row.seconds:.2f} s, {row.share_seconds:.2f}" if (row := here.get(name)) else "" for name in commands
            ]
            lines.append(
                "| " + " | ".join([named, *(f"{raw[name]:.2f} s" for name in ("squeue", "sprio")), *took]) + " |"
            )
    by_name = {change["what"]: change for change in growth}
    first, last = by_name["status"]["pending"]
    grown = [f"+{by_name[name]['share_seconds']:.2f} (raw +{by_name[name]['raw_seconds']:.2f})" for name in commands]
    lines.append(f"| share's growth, {first // 100 * 100:,} to {last // 100 * 100:,} | | | " + " | ".join(grown) + " |")
    missed = "; ".join(f"{goal['goal']} (measured: {goal['measured']})" for goal in goals if not goal["holds"])
    most = max(row.memory_mib for row in rows)
    lines += ["", f"At most {most:.0f} MiB. {sum(goal['holds'] for goal in goals)} of {len(goals)} goals hold"
              + (f"; missed: {missed}." if missed else ".")]  # fmt: skip
    return "\n" + "\n".join(lines) + "\n\n"


def main() -> int:
    if (missing := find_missing()) is not None:
        print(f"status and why before a long queue are not measured: {missing}", file=sys.stderr)
        return 0 if "--where-possible" in sys.argv else 1
    with tempfile.TemporaryDirectory(prefix="bench-queue-") as scratch:
        directory = Path(scratch)
        directory.chmod(0o755)
        cluster = LongQueue(directory / "slurm")
        try:
            cluster.start()
            rows = measure_queue(cluster, directory)
            slurm = cluster.call("sbatch", "--version").stdout.strip()
            cluster.call("scancel", "--user=root", check=False, timeout=120)
        finally:
            cluster.stop()
    versions = {name: version(name) for name in ("lora-jobs", "typer", "rich")} | {"slurm": slurm}
    machine = {"python": platform.python_version(), "cpus": os.cpu_count(), "system": platform.platform()}
    machine["load"] = round(os.getloadavg()[0], 1)
    RESULTS.parent.mkdir(exist_ok=True)
    growth = measure_growth(rows)
    goals = check_goals(rows, growth)
    document = {
        "pairs": PAIRS, "rows": [asdict(row) for row in rows], "growth": growth, "goals": goals,
        "versions": versions, "machine": machine,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(document, indent=2) + "\n")
    before, _, rest = README.read_text().partition(BEGIN)
    README.write_text(before + BEGIN + render_table(rows, growth, goals) + END + rest.partition(END)[2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
