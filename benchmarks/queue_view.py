"""What `status` and `why` cost over the raw squeue and sprio, with a long queue and with many run directories.

`make bench-queue` (as root: it starts the tests' Slurm) prints the tables and writes results/queue_view.json.
Each pair is measured in turn in one run; the ratio is the median of the pairs' ratios. "least" is the fastest of ours
less the fastest of the raw calls: what is left where other programs of a busy machine got in the way least. Memory is
the highest resident set of the process (without Slurm's own commands), from wait4. The processor time (user and system,
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
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results" / "queue_view.json"
sys.path.insert(0, str(ROOT / "tests" / "cluster"))

from slurm_cluster import ACCOUNT, SlurmCluster, find_missing, wait_until  # noqa: E402

from lora_jobs.runs import Submission, append_submission, create_run  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Sequence

SIZES = (100, 1_000, 10_000)
USERS = ("root", "daemon", "bin", "games")
PAIRS = int(os.environ.get("BENCH_PAIRS", "7"))
RUNS = 10_000
FILES = {"spec.yaml": "name: a\n", "script.sbatch": "#SBATCH --time=00:10:00\n"}


@dataclass(frozen=True, slots=True)
class Row:
    """One command beside the raw calls: medians in seconds, their difference (of medians, of the fastest), MiB."""

    what: str
    pending: int
    run_directories: int
    seconds: float
    raw: str
    raw_seconds: float
    over_raw_seconds: float
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
    memory = 0.0
    for number in range(PAIRS + 1):
        ours, used, cpu = run_measured(argv, environment)
        answers = [run_measured(call, environment) for call in raw]
        memory = max(memory, used)
        if number:
            pairs.append((ours, sum(answer[0] for answer in answers), cpu, sum(answer[2] for answer in answers)))
    ours, theirs, cpu, raw_cpu = (statistics.median(side) for side in zip(*pairs, strict=True))
    over = statistics.median(pair[0] - pair[1] for pair in pairs)
    least, least_raw = (min(side) for side in list(zip(*pairs, strict=True))[:2])
    ratio = statistics.median(pair[0] / pair[1] for pair in pairs)
    names = " + ".join(" ".join(call[:2]) for call in raw)
    row = Row(
        what, pending, runs, round(ours, 3), names, round(theirs, 3), round(over, 3), round(least, 3),
        round(least_raw, 3), round(ratio, 2), round(memory), round(cpu, 3), round(raw_cpu, 3),
    )  # fmt: skip
    print(
        f"{what:20} {pending:5} pending {runs:5} runs  {row.seconds:.3f} s, raw {row.raw_seconds:.3f} s, "
        f"+{row.over_raw_seconds:.3f} s (least +{least - least_raw:.3f} s)  {row.memory_mib:.0f} MiB  "
        f"processor {row.cpu_seconds:.2f} s, raw {row.raw_cpu_seconds:.2f} s",
        flush=True,
    )
    return row


def fill_queue(cluster: SlurmCluster, number: int, have: int, script: Path) -> None:
    """Held arrays of several users, their tasks split into jobs of their own: squeue prints a row for each."""
    each = (number - have) // len(USERS)
    for user in USERS:
        options = [f"--uid={user}", f"--account={ACCOUNT}", "--chdir=/", "--output=/dev/null", "--gpus-per-node=1"]
        job_id = cluster.call(
            "sbatch", "--parsable", "--hold", f"--array=0-{each}", "--time=10", *options, str(script)
        ).stdout.strip()
        cluster.call("scontrol", "update", f"JobId={job_id}_[0-{each - 1}]", "Nice=1", timeout=300)


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
    squeue = ["squeue", "-h", "--states=all", "-o", "%i|%T|%r|%P|%u|%a|%q|%Q|%V|%S|%M|%l|%D|%b|%N|%j"]
    raw = [squeue, ["sprio", "-h", "-o", "%i|%Y|%A|%F|%J|%P|%Q|%T|%S|%N"]]
    rows = []
    for size in SIZES:
        have = count_pending(cluster)
        fill_queue(cluster, size, have, script)
        pending = count_pending(cluster)
        commands = {"status": ["status"], "why JOB": ["why", mine], "status JOB": ["status", mine]}
        rows += [measure(name, words, raw, pending, 1, environment) for name, words in commands.items()]
    make_runs(home, RUNS, mine)
    commands = {"status": ["status"], "why JOB": ["why", mine], "status OLDEST JOB ID": ["status", "5000002"]}
    rows += [measure(name, words, raw, pending, RUNS, environment) for name, words in commands.items()]
    return rows


def measure_growth(rows: Sequence[Row]) -> list[dict[str, object]]:
    """From the shortest to the longest queue: what each command costs more, and the raw calls beside it, in seconds."""
    found: list[dict[str, object]] = []
    for what in dict.fromkeys(row.what for row in rows if row.run_directories == 1):
        first, *_, last = [row for row in rows if row.what == what and row.run_directories == 1]
        growth = {
            "what": what,
            "pending": [first.pending, last.pending],
            "least_seconds": round(last.least_seconds - first.least_seconds, 3),
            "least_raw_seconds": round(last.least_raw_seconds - first.least_raw_seconds, 3),
            "cpu_seconds": round(last.cpu_seconds - first.cpu_seconds, 3),
            "raw_cpu_seconds": round(last.raw_cpu_seconds - first.raw_cpu_seconds, 3),
        }
        print("growth", json.dumps(growth))
        found.append(growth)
    return found


def main() -> int:
    if (missing := find_missing()) is not None:
        print(f"not measured: {missing}", file=sys.stderr)
        return 1
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
    table = [asdict(row) for row in rows]
    document = {
        "pairs": PAIRS, "rows": table, "growth": measure_growth(rows), "versions": versions, "machine": machine,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
