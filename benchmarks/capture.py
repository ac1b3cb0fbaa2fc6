"""What `status`, `status JOB`, `why` and `plan` print on a real Slurm with a full partition, put into the README.

`make capture` (as root: it starts the tests' Slurm). The queue is made up, the answers are the programs' own.
"""

from __future__ import annotations

import os
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

from lora_jobs.runs import (  # noqa: E402
    Submission,
    append_metrics,
    append_submission,
    begin_attempt,
    create_run,
)

WHOLE = ("--nodes=2", "--gpus-per-node=4", "--time=06:00:00")
SPEC = "jobs/gemma2_9b_svg.yaml"


def fill(cluster: SlurmCluster, home: Path, script: Path) -> str:
    """Runs that train, failed and wait, and other users' jobs; returns the id of the one to explain."""

    def submit(*options: str) -> str:
        answer = cluster.call("sbatch", "--parsable", "--output=/dev/null", *options, str(script))
        return answer.stdout.strip()

    def make(name: str, job_id: str) -> None:
        limit = "#!/bin/bash\n#SBATCH --time=06:00:00\n"
        estimate = '{"world_size": 8, "estimate": {"peak_bytes": 60129542144, "allocated_peak_bytes": 55834574848}}'
        files = {"spec.yaml": f"name: {name}\n", "script.sbatch": limit, "estimate.json": estimate}
        run = create_run(home, f"{name}-1", files)
        append_submission(run, Submission(job_id, "slurm", time.time(), "login01"))
        if name == "gemma2_9b_svg":
            attempt = begin_attempt(run, job_id=job_id, restart_count=0, backend="slurm", host="lrdn0001",
                                    resume_from=None, first_step=0)  # fmt: skip
            row = {"kind": "train", "step": 120, "max_steps": 500, "loss": 0.8312, "tokens_per_second": 6120.0,
                   "memory_allocated_bytes": 54_760_833_024, "attempt": 1,
                   "time": attempt.started_at + 1800}  # fmt: skip
            append_metrics(run, row)

    failed = submit("--nodes=1", "--gpus-per-node=1", "--time=10", "--export=FAIL=1")
    wait_until(lambda: state(cluster, failed) == "FAILED", "the job that fails", cluster.root)
    make("gemma3_1b", failed)
    running = submit(*WHOLE)
    wait_until(lambda: state(cluster, running) == "RUNNING", "the job that runs", cluster.root)
    make("gemma2_9b_svg", running)
    submit(*WHOLE, "--qos=boost_qos_dbg", "--time=00:30:00")
    submit("--nodes=1", "--gpus-per-node=2", "--time=02:00:00", "--array=0-10%2", "--uid=daemon",
           f"--account={ACCOUNT}", "--chdir=/")  # fmt: skip
    waiting = submit("--nodes=1", "--gpus-per-node=2", "--time=06:00:00")
    make("llama32_3b_climate", waiting)
    make("smollm2_135m", submit("--nodes=1", "--gpus-per-node=1", "--time=10", "--hold"))
    time.sleep(6)  # a round of backfill: expected starts
    return waiting


def state(cluster: SlurmCluster, job_id: str) -> str:
    return cluster.call("squeue", "-h", "--states=all", "-o", "%T", "-j", job_id).stdout.strip()


def main() -> int:
    if (missing := find_missing()) is not None:
        print(f"nothing captured: {missing}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="capture-") as scratch:
        directory = Path(scratch)
        directory.chmod(0o755)
        home = directory / "runs"
        script = directory / "job.sh"
        script.write_text("#!/bin/bash\n[[ -z ${FAIL:-} ]] || exit 3\nsleep 3000\n")
        cluster = SlurmCluster(directory / "slurm")
        try:
            cluster.start()
            cluster.call("sacctmgr", "-i", "add", "user", "daemon", f"account={ACCOUNT}")
            waiting = fill(cluster, home, script)
            environment = {**cluster.environment, "LORA_JOBS_HOME": str(home), "NO_COLOR": "1"}
            place = directory / "leotest.yaml"  # the same partitions, as if their GPUs were Leonardo's
            place.write_text((ROOT / "tests/cluster/test_cluster.yaml").read_text().replace("gpu: cpu", "gpu: A100-64"))
            options = ["--set", f"resources.cluster={place}", "--set", f"resources.account={ACCOUNT}"]
            shown = []
            for words in (["status"], ["why", waiting], ["status", waiting], ["plan", SPEC, *options]):
                argv = [sys.executable, "-m", "lora_jobs", *words]
                answer = subprocess.run(argv, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
                lines = [line.rstrip() for line in (answer.stdout + answer.stderr).splitlines()]
                typed = " ".join(word for word in words if word not in options)
                text = "\n".join([f"$ lora-jobs {typed}", *lines]).replace(str(home), "runs").replace(f"{ROOT}/", "")
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
