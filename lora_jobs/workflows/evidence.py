"""What is known of a run's newest job: its own records, Slurm's answer, and the processes of this machine."""

from __future__ import annotations

import os
import pwd
import socket
from typing import TYPE_CHECKING

from lora_jobs.cluster.local import is_launcher_alive
from lora_jobs.runs import (
    Run,
    Submission,
    derive_submission,
    find_own_sweep,
    load_submissions,
    load_sweep_submissions,
)
from lora_jobs.workflows.states import Evidence

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lora_jobs.cluster.observation import Observation, Sighting
    from lora_jobs.cluster.parsers import SlurmJob
    from lora_jobs.runs import Attempt, Backend


def list_jobs(run: Run, attempts: Sequence[Attempt]) -> list[Submission]:
    """Every job of the run, oldest first; one whose submission was not recorded (Ctrl-C, full disk) but that began."""
    jobs = load_submissions(run)
    if attempts and attempts[-1].job_id not in {job.job_id for job in jobs}:
        last = attempts[-1]
        jobs.append(Submission(last.job_id, last.backend, last.started_at, last.host))
    return jobs or find_unrecorded_jobs(run)


def find_unrecorded_jobs(run: Run) -> list[Submission]:
    """Jobs whose submission was cut off after Slurm took them: submitit names a file after each that it queued."""
    found = []
    for path in run.submitit.glob("*_submitted.pkl"):
        backend: Backend = "slurm" if '"backend": "slurm"' in read_text(run.environment_path) else "local"
        found.append(
            Submission(path.name.removesuffix("_submitted.pkl"), backend, path.stat().st_mtime, socket.gethostname())
        )
    if not found and (derived := derive_submission(run)) is not None:
        found.append(derived)
    return sorted(found, key=lambda job: job.submitted_at)


def waits_for_turn(run: Run) -> bool:
    """True for a task of a sweep on this machine while the process lives that starts its tasks."""
    sweep = find_own_sweep(run)
    return sweep is not None and any(is_launcher_alive(known) for known in load_sweep_submissions(sweep))


def read_text(path: Path) -> str:
    """The text of a file; empty where there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def find_user() -> str | None:
    """The name of who runs this; None where the system has none for the number."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return None


def find_sighting(run: Run, last: Submission | None, seen: Observation) -> Sighting | None:
    """What Slurm shows under the id of a run's job; None where it is not that job."""
    sighting = seen.jobs.get(last.job_id) if last is not None and last.backend == "slurm" else None
    return sighting if sighting is not None and is_ours(run, sighting.job) else None


def is_ours(run: Run, job: SlurmJob) -> bool:
    """False for a stranger's: ids are used again after a while, and another user's job of another name has it now."""
    return job.name in (run.id, run.name) or job.user in (None, "", find_user())


def gather_evidence(
    run: Run,
    last: Submission | None,
    attempt: Attempt | None,
    seen: Observation,
    alive: frozenset[str],
    *,
    finished: bool,
) -> Evidence:
    """Everything that is known of a run's newest job; `alive` holds the submitit folders of living processes."""
    sighting = find_sighting(run, last, seen)
    here = last is None or last.host == socket.gethostname()
    return Evidence(
        submission=last,
        attempt=attempt,
        job=sighting.job if sighting else None,
        queue_answered=seen.queue_answered,
        has_processes=str(run.submitit.absolute()) in alive or (last is not None and here and is_launcher_alive(last)),
        is_here=here,
        waits_for_turn=last is None and waits_for_turn(run),
        is_finished=finished,
    )
