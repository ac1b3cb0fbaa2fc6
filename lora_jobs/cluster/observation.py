"""What Slurm knows of many jobs at once: one squeue, one sprio, one sacct and one scontrol at the most."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from msgspec import Struct, field
from msgspec.structs import replace

from lora_jobs.cluster.client import NO_SUCH_JOB, ask_sacct, ask_sprio
from lora_jobs.cluster.commands import clean_environment, find_query_seconds, run_command
from lora_jobs.cluster.parsers import QUEUE_FORMAT, Factors, SlurmJob, is_job_id, match_ids, parse_config
from lora_jobs.cluster.queue import Place, Queue, find_places, fold_tasks, parse_queue
from lora_jobs.cluster.refusals import explain_refusal
from lora_jobs.errors import ClusterError
from lora_jobs.runs import is_ended

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

MULTIFACTOR = "priority/multifactor"


class Sighting(Struct, frozen=True):
    """One job (or array) as Slurm shows it now, its tasks by state, and its place among those that wait."""

    job: SlurmJob
    tasks: dict[str, int]
    place: Place | None = None


class Observation(Struct, frozen=True):
    """The jobs that Slurm knows by the id asked for, their earlier starts, and what could not be read.

    `history` is filled where it was asked for. `config` is slurm.conf as scontrol shows it, read when a job waits.
    """

    jobs: dict[str, Sighting] = field(default_factory=dict)
    history: dict[str, tuple[SlurmJob, ...]] = field(default_factory=dict)
    of_users: tuple[Sighting, ...] = ()
    config: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    queue_answered: bool = True
    """False when squeue could not be asked: a job that is missing here may well be alive."""


def observe_jobs(
    ids: Sequence[str],
    *,
    users: Sequence[str] = (),
    past: Sequence[str] = (),
    ranked: bool = True,
    factors: bool = True,
) -> Observation:
    """What Slurm knows of these jobs; `past` are ids whose every start is wanted (status of one run).

    A rank needs everybody's jobs; without `ranked` only these jobs are asked for, and no configuration. Without
    `factors` the priorities stay sums: sprio reads the whole queue once more.

    Never raises for a Slurm that is away: what can't be read is missing, and the notes say why.
    """
    wanted = [job_id for job_id in dict.fromkeys(ids) if is_job_id(job_id)]
    notes: list[str] = []
    answer = _ask_queue(wanted, users, notes, ranked=ranked) if wanted or users else Queue({})
    folded = {job_id: fold_tasks(rows) for job_id, rows in (answer or Queue({})).jobs.items()}
    waiting = [job_id for job_id, (job, _) in folded.items() if job.pending]
    config = _ask_config(notes) if waiting and ranked else {}
    parts = _ask_factors(waiting, config, notes) if factors else {}
    visible = ranked and bool(waiting) and _is_queue_visible(config, notes)
    places = (
        find_places(answer.waiting, {job_id: folded[job_id][0] for job_id in waiting}) if answer and visible else {}
    )
    jobs = {
        job_id: Sighting(replace(job, job_id=job_id, factors=parts.get(job_id)), tasks, places.get(job_id))
        for job_id, (job, tasks) in folded.items()
    }
    asked = list(dict.fromkeys([*[job_id for job_id in wanted if job_id not in jobs], *filter(is_job_id, past)]))
    history = _find_history(asked, notes) if asked else {}
    missing = {job_id: history.get(job_id, ()) for job_id in wanted if job_id not in jobs}
    jobs |= _find_ended(missing, notes, queue_answered=answer is not None)
    of_users = _fold_arrays(answer.of_users if answer else ())
    return Observation(jobs, history, of_users, config, tuple(notes), queue_answered=answer is not None)


def _find_ended(
    history: Mapping[str, Sequence[SlurmJob]], notes: list[str], *, queue_answered: bool
) -> Iterator[tuple[str, Sighting]]:
    """The last state of the jobs that the queue does not hold, out of accounting's rows of each."""
    for job_id, rows in history.items():
        last = _find_last(rows, job_id)
        if last is None:
            continue
        # The queue forgets a job only once it is over: accounting that still calls it alive has missed its end.
        if queue_answered and not is_ended(last.state):
            notes.append(f"job {job_id}: accounting still says {last.state}, the queue no longer holds it")
        else:
            yield job_id, Sighting(last, {last.state: 1})


def _find_history(ids: Sequence[str], notes: list[str]) -> dict[str, tuple[SlurmJob, ...]]:
    """Accounting's rows for each job: one per start, an array's own row and its tasks' for the array."""
    found: dict[str, list[SlurmJob]] = {job_id: [] for job_id in ids}
    for row in ask_sacct(ids, notes):
        for job_id in match_ids(row.job_id, found):
            found[job_id].append(row)
    return {job_id: tuple(rows) for job_id, rows in found.items()}


def _find_last(rows: Sequence[SlurmJob], job_id: str) -> SlurmJob | None:
    """Of several rows (one per start) the one that was submitted or started last; a task's own before its array's."""
    own = [row for row in rows if row.job_id == job_id]
    return max(own or rows, key=lambda row: row.started or row.submitted or "", default=None)


def _fold_arrays(rows: Sequence[SlurmJob]) -> tuple[Sighting, ...]:
    """One sighting per job or array, in the queue's order; no ranks."""
    arrays: dict[str, list[SlurmJob]] = {}
    for row in rows:
        arrays.setdefault(row.job_id.partition("_")[0], []).append(row)
    folded = {job_id: fold_tasks(found) for job_id, found in arrays.items()}
    return tuple(Sighting(replace(job, job_id=job_id), tasks) for job_id, (job, tasks) in folded.items())


def _ask_queue(ids: Sequence[str], users: Sequence[str], notes: list[str], *, ranked: bool) -> Queue | None:
    """The whole queue, hidden partitions too, or these jobs only; None when it could not be read.

    Arrays stay folded, their task lists uncut (SLURM_BITSTR_LEN=0): less to send and to read than a row per task.
    """
    argv = ["squeue", "-h", "--all", "--states=all", "-o", QUEUE_FORMAT]
    argv += [] if ranked or users else ["-j", ",".join(ids)]
    try:
        answer = run_command(argv, timeout=find_query_seconds(), env={**clean_environment(), "SLURM_BITSTR_LEN": "0"})
        if answer.returncode == 0:
            return parse_queue(answer.stdout, ids, users=users)
        if NO_SUCH_JOB in answer.stderr:
            return Queue({})
        notes.append(f"queue not readable: {explain_refusal(answer.stderr).message}")
    except ClusterError as error:
        notes.append(f"queue not readable: {error.message}")
    return None


def _ask_config(notes: list[str]) -> dict[str, str]:
    """slurm.conf as the controller has it; {} and a note when it can't be read."""
    try:
        answer = run_command(["scontrol", "show", "config"], timeout=find_query_seconds())
        if answer.returncode == 0:
            return parse_config(answer.stdout)
        notes.append(f"configuration not readable: {explain_refusal(answer.stderr).message}")
    except ClusterError as error:
        notes.append(f"configuration not readable: {error.message}")
    return {}


def _ask_factors(waiting: Sequence[str], config: dict[str, str], notes: list[str]) -> dict[str, Factors]:
    if not waiting:
        return {}
    kind = config.get("PriorityType", MULTIFACTOR)
    if kind != MULTIFACTOR:
        notes.append(f"no priority factors: this cluster has {kind}, first come first served")
        return {}
    return ask_sprio(waiting, notes)


def _is_queue_visible(config: dict[str, str], notes: list[str]) -> bool:
    """False, with a note, where users see (or may see) their own jobs only: a rank among those would be a false one."""
    private = config.get("PrivateData", "none").lower().split(",")
    if os.geteuid() == 0 or (config and "jobs" not in private):
        return True
    if not config:
        notes.append("no rank in the queue: without the configuration it is not known whether others' jobs are hidden")
        return False
    notes.append("no rank in the queue: this cluster shows you your own jobs only (PrivateData=jobs)")
    return False
