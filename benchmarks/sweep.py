"""What it costs to check, write and submit a sweep of 1,000 runs, beside the raw sbatch call for the same array.

`make bench-sweep` (as root: it starts the tests' Slurm) prints the table and writes results/sweep.json. Ours and the
raw call are measured in turn in one run, as whole processes; nothing of the arrays ever starts, since another job holds
the nodes.
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
RESULTS = Path(__file__).resolve().parent / "results" / "sweep.json"
sys.path.insert(0, str(ROOT / "tests" / "cluster"))

from queue_view import LongQueue  # noqa: E402 - the tasks of a cancelled array count for another minute
from slurm_cluster import ACCOUNT, SlurmCluster, find_missing, wait_until  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Sequence

PAIRS = int(os.environ.get("BENCH_PAIRS", "5"))
TEN_RATES = ",".join(f"{number}e-5" for number in range(1, 11))
SWEEPS = {
    "10 sizes": ("lora.r=4,8,12,16,20,24,28,32,40,48", f"training.learning_rate={TEN_RATES}",
                 "training.seed=1,2,3,4,5,6,7,8,9,10"),
    "1,000 sizes": ("lora.r=4,8,12,16,20,24,28,32,40,48", "data.max_length=128,192,256,320,384,448,512,576,640,704",
                    "training.per_device_eval_batch_size=1,2,3,4,5,6,7,8,9,10"),
}  # fmt: skip
ENVIRONMENT = """
scheduler: slurm
account_required: true
default_partition: boost_usr_prod
partitions: {boost_usr_prod: {gpu: A100-64, gpus_per_node: 4, cpus_per_node: 32, max_time: "24:00:00", max_nodes: 2}}
"""


@dataclass(frozen=True, slots=True)
class Row:
    """A command beside the raw sbatch call: medians in seconds and their difference; highest resident set in MiB."""

    what: str
    runs: int
    seconds: float
    raw_seconds: float | None
    over_raw_seconds: float | None
    memory_mib: int


def run_measured(argv: Sequence[str], environment: dict[str, str], directory: Path) -> tuple[float, float, str]:
    """Seconds, MiB and stdout of one command."""
    with tempfile.TemporaryFile() as out:
        start = time.perf_counter()
        process = subprocess.Popen(argv, env=environment, cwd=directory, stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read().decode()
    assert process.returncode == 0, (argv, text)
    return seconds, usage.ru_maxrss / 1024, text


@dataclass(frozen=True, slots=True)
class Bench:
    """The cluster, a directory to work in, and the environment of every command."""

    cluster: SlurmCluster
    directory: Path
    environment: dict[str, str]

    def submit(self, sweep: Sequence[str]) -> list[str]:
        """The command that submits this sweep of Gemma 2 9B."""
        sets = [
            f"resources.cluster={self.directory}/bench.yaml", f"resources.account={ACCOUNT}",
            f"data.train={self.directory}/train.jsonl", f"data.eval={self.directory}/train.jsonl",
        ]  # fmt: skip
        words = [word for each in sets for word in ("--set", each)]
        words += [word for each in sweep for word in ("--sweep", each)]
        spec = str(ROOT / "jobs" / "gemma2_9b_svg.yaml")
        return [sys.executable, "-m", "lora_jobs", "submit", spec, "--cluster", "slurm", "--json", *words]

    def use_new_home(self) -> dict[str, str]:
        """The environment with an empty runs folder."""
        return {**self.environment, "LORA_JOBS_HOME": tempfile.mkdtemp(prefix="runs-", dir=self.directory)}

    def measure(self, what: str, sweep: Sequence[str]) -> Row:
        """Ours and the raw call in turn, once to warm up and then PAIRS times; each array is cancelled again.

        Each sweep gets a runs folder of its own, all kept to the end: ext4 is slow to reuse what was just deleted.
        """
        pairs, memory = [], 0.0
        for number in range(PAIRS + 1):
            ours, used, text = run_measured(self.submit(sweep), self.use_new_home(), self.directory)
            sent = json.loads(text)
            script = f"{sent['directory']}/script.sbatch"
            theirs, _, raw_id = run_measured(["sbatch", "--parsable", script], self.environment, self.directory)
            assert len(sent["tasks"]) == 1000
            self.cluster.call("scancel", sent["job_id"], raw_id.strip(), timeout=300)
            memory = max(memory, used)
            if number:
                pairs.append((ours, theirs))
        ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
        over = statistics.median(a - b for a, b in pairs)
        return Row(what, 1000, round(ours, 2), round(theirs, 3), round(over, 2), round(memory))

    def measure_views(self) -> list[Row]:
        """`status` and `compare` with a sweep of 1,000 runs in the queue."""
        environment = self.use_new_home()
        _, _, text = run_measured(self.submit(SWEEPS["10 sizes"]), environment, self.directory)
        name = json.loads(text)["sweep"]
        rows = []
        for words in (["status"], ["status", name], ["compare", name]):
            argv = [sys.executable, "-m", "lora_jobs", *words, "--json"]
            found = [run_measured(argv, environment, self.directory) for _ in range(PAIRS + 1)][1:]
            seconds = statistics.median(each[0] for each in found)
            what = " ".join(["lora-jobs", words[0], *(["NAME"] if words[1:] else [])])
            rows.append(Row(what, 1000, round(seconds, 2), None, None, round(max(each[1] for each in found))))
        return rows


def measure_all(cluster: SlurmCluster, directory: Path) -> list[Row]:
    environment = {**cluster.environment, "SLURM_CONF": str(cluster.slurm_conf)}
    (directory / "bench.yaml").write_text(ENVIRONMENT)
    row = json.dumps({"svg": "<svg/>" * 20, "caption": "a picture"})
    (directory / "train.jsonl").write_text(f"{row}\n" * 200)
    (directory / "hold.sh").write_text("#!/bin/bash\nsleep 3000\n")
    whole = ("--nodes=2", "--exclusive", "--gpus-per-node=4", "--time=60", "--output=/dev/null")
    holding = cluster.call("sbatch", "--parsable", *whole, str(directory / "hold.sh")).stdout.strip()
    wait_until(lambda: "RUNNING" in cluster.call("squeue", "-h", "-j", holding, "-o", "%T").stdout, "it", cluster.root)
    bench = Bench(cluster, directory, environment)
    rows = [bench.measure(f"submit, {what}", sweep) for what, sweep in SWEEPS.items()]
    return [*rows, *bench.measure_views()]


def main() -> int:
    if (missing := find_missing()) is not None:
        print(f"not measured: {missing}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="bench-sweep-") as scratch:
        cluster = LongQueue(Path(scratch) / "slurm")
        (Path(scratch) / "slurm").mkdir()
        try:
            cluster.start()
            rows = measure_all(cluster, Path(scratch))
            slurm = cluster.call("sbatch", "--version").stdout.strip()
            cluster.call("scancel", "--user=root", check=False, timeout=120)
        finally:
            cluster.stop()
    for row in rows:
        raw = "" if row.raw_seconds is None else f"  raw sbatch {row.raw_seconds:6.3f} s  +{row.over_raw_seconds:.2f} s"
        print(f"{row.what:24} {row.runs:5} runs  {row.seconds:6.2f} s{raw}  {row.memory_mib} MiB")
    versions = {name: version(name) for name in ("lora-jobs", "pydantic", "submitit")} | {"slurm": slurm}
    machine = {"python": platform.python_version(), "cpus": os.cpu_count(), "system": platform.platform()}
    machine["load"] = round(os.getloadavg()[0], 1)
    RESULTS.parent.mkdir(exist_ok=True)
    document = {"pairs": PAIRS, "rows": [asdict(row) for row in rows], "versions": versions, "machine": machine}
    RESULTS.write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
