"""What `status`, `status JOB`, `why` and `plan` print on a real Slurm with a full partition, put into the README.

`make capture` (as root: it starts the tests' Slurm). The
running job is the tiny one and really trains; the rest of the queue is made up; the answers are the programs' own.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- make capture -->\n", "<!-- /make capture -->\n"
sys.path.insert(0, str(ROOT / "tests" / "cluster"))

from slurm_cluster import ACCOUNT, SlurmCluster, find_missing, wait_until  # noqa: E402

from lora_jobs.runs import Run, Submission, append_submission, create_run  # noqa: E402

WHOLE = ("--nodes=2", "--gpus-per-node=4", "--time=06:00:00")
SPEC = "jobs/gemma2_9b_svg.yaml"


def fill(cluster: SlurmCluster, desk: Path, environment: dict[str, str]) -> tuple[str, str]:
    """A run that really trains, a failed one, others that wait, other users' jobs; ids: the running, one that waits."""
    script = desk / "job.sh"
    script.write_text("#!/bin/bash\n[[ -z ${FAIL:-} ]] || exit 3\nsleep 3000\n")

    def submit(*options: str) -> str:
        answer = cluster.call("sbatch", "--parsable", "--output=/dev/null", *options, str(script))
        return answer.stdout.strip()

    def make(name: str, job_id: str) -> None:
        limit = "#!/bin/bash\n#SBATCH --time=06:00:00\n"
        estimate = '{"world_size": 2, "estimate": {"peak_bytes": 60129542144, "allocated_peak_bytes": 55834574848}}'
        files = {"spec.yaml": f"name: {name}\n", "script.sbatch": limit, "estimate.json": estimate}
        append_submission(
            create_run(desk / "runs", f"{name}-1", files), Submission(job_id, "slurm", time.time(), "login01")
        )

    failed = submit("--nodes=1", "--gpus-per-node=1", "--time=10", "--export=FAIL=1")
    wait_until(lambda: state(cluster, failed) == "FAILED", "the job that fails", cluster.root)
    make("gemma3_1b", failed)
    running = train(desk, environment)
    for gpus in (4, 3):  # the rest of the partition
        submit(
            "--nodes=1",
            f"--gpus-per-node={gpus}",
            "--time=06:00:00",
            "--uid=daemon",
            f"--account={ACCOUNT}",
            "--chdir=/",
        )
    submit(*WHOLE, "--qos=boost_qos_dbg", "--time=00:30:00")
    submit("--nodes=1", "--gpus-per-node=2", "--time=02:00:00", "--array=0-10%2", "--uid=daemon",
           f"--account={ACCOUNT}", "--chdir=/")  # fmt: skip
    waiting = submit("--nodes=1", "--gpus-per-node=2", "--time=06:00:00")
    make("llama32_3b", waiting)
    make("smollm2", submit("--nodes=1", "--gpus-per-node=1", "--time=10", "--hold"))
    time.sleep(6)  # a round of backfill: expected starts
    return running, waiting


def train(desk: Path, environment: dict[str, str]) -> str:
    """The tiny job, submitted and training for a few checkpoints; its job id."""
    argv = [sys.executable, "-m", "lora_jobs.training.demo", "tiny", "--models", "models", "--data", "data"]
    subprocess.run(argv, cwd=desk, env=environment, check=True, stdout=subprocess.DEVNULL)
    words = ["submit", str(ROOT / "jobs" / "tiny_gemma2.yaml"), "--cluster", "slurm", "--json"]
    for setting in ("resources.cluster=./tiny_cluster.yaml", f"resources.account={ACCOUNT}",
                    "resources.gpus_per_node=1", "training.max_steps=2000",
                    "training.save_steps=50", "training.logging_steps=5"):  # fmt: skip
        words += ["--set", setting]
    argv = [sys.executable, "-m", "lora_jobs", *words]
    answer = subprocess.run(argv, cwd=desk, env=environment, check=True, stdout=subprocess.PIPE)
    sent = json.loads(answer.stdout)
    run = Run(desk / "runs" / "tiny_gemma2-1")
    wait_until(
        lambda: any(run.checkpoints.glob("checkpoint-100/MANIFEST.json")), "two checkpoints", desk / "slurm", 400
    )
    return str(sent["job_id"])


def write_data(directory: Path) -> None:
    """Rows as long as the demo's drawings and captions, so that `plan` can tell how long the training takes."""
    directory.mkdir(parents=True)
    row = json.dumps({"svg": "<svg>" + "M12 34l5 6" * 60 + "</svg>", "caption": "A drawing. " * 4}) + "\n"
    for name, rows in (("train", 1600), ("eval", 160)):
        (directory / f"{name}.jsonl").write_text(row * rows)


def state(cluster: SlurmCluster, job_id: str) -> str:
    return cluster.call("squeue", "-h", "--states=all", "-o", "%T", "-j", job_id).stdout.strip()


def main() -> int:
    if (missing := find_missing()) is not None:
        print(f"nothing captured: {missing}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="capture-") as scratch:
        directory = Path(scratch)
        directory.chmod(0o755)
        cluster = SlurmCluster(directory / "slurm")
        for name, gpu in (("leotest", "A100-64"), ("tiny_cluster", "cpu")):  # the same partitions, as if Leonardo's
            text = (ROOT / "tests/cluster/test_cluster.yaml").read_text().replace("gpu: cpu", f"gpu: {gpu}")
            (directory / f"{name}.yaml").write_text(text)
        (directory / "jobs").mkdir()
        shutil.copy(ROOT / SPEC, directory / "jobs")
        write_data(directory / "data" / "fontawesome")
        shown = []
        try:
            cluster.start()
            cluster.call("sacctmgr", "-i", "add", "user", "daemon", f"account={ACCOUNT}")
            environment = {**cluster.environment, "LORA_JOBS_HOME": str(directory / "runs"), "NO_COLOR": "1"}
            running, waiting = fill(cluster, directory, environment)
            options = ["--set", "resources.cluster=./leotest.yaml", "--set", f"resources.account={ACCOUNT}"]
            for words in (["status"], ["why", waiting], ["status", running], ["plan", SPEC, *options]):
                argv = [sys.executable, "-m", "lora_jobs", *words]
                answer = subprocess.run(
                    argv, env=environment, cwd=directory, capture_output=True, text=True, check=False
                )
                lines = [line.rstrip() for line in (answer.stdout + answer.stderr).splitlines()]
                text = "\n".join([f"$ lora-jobs {shlex.join(words)}", *lines]).replace(f"{directory}/", "")
                shown.append("".join(f"    {line}".rstrip() + "\n" for line in text.splitlines()))
            cluster.call("scancel", "--user=root", check=False)
        finally:
            cluster.stop()
    text = README.read_text()
    if BEGIN not in text:
        print(f"README.md has no {BEGIN.strip()}", file=sys.stderr)
        return 1
    before, _, rest = text.partition(BEGIN)
    README.write_text(before + BEGIN + "\n" + "\n".join(shown) + "\n" + END + rest.partition(END)[2])
    print(f"README.md: {len(shown)} captures", file=sys.stderr)
    return 0


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
