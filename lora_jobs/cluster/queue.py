"""The whole queue from one squeue: my jobs, and who waits in front of them."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from msgspec import Struct

from lora_jobs.cluster.parsers import (
    PENDING_STATES,
    QUEUE_FORMAT,
    SlurmJob,
    match_ids,
    parse_tasks,
    read_queued_job,
    split_rows,
)
from lora_jobs.units import parse_duration

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

_COLUMNS = QUEUE_FORMAT.count("|") + 1
_GPUS = re.compile(r"gpu(?::[A-Za-z][\w.-]*)?[:=](\d+)|gpu(?![\w:=])")
HOUR = 3600


class Waiting(NamedTuple):
    """One row of what waits: a job, or the tasks of an array that wait together."""

    job_id: str
    partition: str
    user: str
    account: str
    priority: int
    tasks: int
    nodes: str
    gpus: str
    limit: str


class Queue(Struct, frozen=True):
    """What squeue said: the jobs that were asked for (a row per state of an array), and all that waits."""

    jobs: dict[str, tuple[SlurmJob, ...]]
    waiting: tuple[Waiting, ...] = ()
    of_users: tuple[SlurmJob, ...] = ()


class Place(Struct, frozen=True):
    """Where a job stands among the pending jobs of a partition, and what stands before it, in sum.

    `rank` is 1 for the first: jobs with a higher priority and one. GPUs and GPU-hours count what the jobs ask for per
    node; a job that asks otherwise counts none.
    """

    partition: str
    rank: int
    pending: int
    users_ahead: int
    nodes_ahead: int
    gpus_ahead: int
    gpu_hours_ahead: float
    mine_ahead: int


def parse_queue(text: str, ids: Collection[str], *, users: Collection[str] = ()) -> Queue:
    """The queue of `squeue -h --states=all -o QUEUE_FORMAT`. Errors: OutputError when there is text and no job in it.

    Only rows of the jobs in `ids` (and of `users`) become whole jobs, so that a long queue costs little.
    """
    wanted = frozenset(ids)
    bases = {_find_base(job_id) for job_id in ids}
    jobs: dict[str, list[SlurmJob]] = {}
    waiting, of_users = [], []
    rows = 0
    for line in text.splitlines():  # ten thousand times: as little as can be
        row = line.split("|", _COLUMNS - 1)
        if len(row) != _COLUMNS or not row[0][:1].isdigit():
            continue  # a site's banner
        rows += 1
        job_id, state, _, partition, user, account, _, priority, _, _, _, limit, nodes, gpus, *_ = row
        if state in PENDING_STATES:
            points = int(priority) if priority.isdecimal() else 0
            tasks = count_tasks(job_id) if job_id[-1] == "]" else 1
            waiting.append(Waiting(job_id, partition, user, account, points, tasks, nodes, gpus, limit))
        if (job_id if job_id.isdecimal() else _find_base(job_id)) in bases:
            job = read_queued_job(row)
            for found in match_ids(job_id, wanted):
                jobs.setdefault(found, []).append(job)
        elif user in users:
            of_users.append(read_queued_job(row))
    if not rows and text.strip():
        split_rows(text, columns=_COLUMNS, program="squeue")  # says what it read instead
    return Queue({job_id: tuple(rows_of) for job_id, rows_of in jobs.items()}, tuple(waiting), tuple(of_users))


def _find_base(job_id: str) -> str:
    """The job's own number: 12 of 12_3, 12_[0-3] and 12+1."""
    return job_id.partition("_")[0].partition("+")[0]


def fold_tasks(rows: Iterable[SlurmJob]) -> tuple[SlurmJob, dict[str, int]]:
    """One row that stands for all (a running one before a waiting one), and how many tasks are in which state."""
    rows = list(rows)
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.state] = counts.get(row.state, 0) + count_tasks(row.job_id)
    order = {"RUNNING": 0, "CONFIGURING": 1, "COMPLETING": 2, "PENDING": 3}
    newest = max(rows, key=lambda row: (-order.get(row.state, 4), row.started or row.submitted or ""))
    return newest, counts


def count_tasks(job_id: str) -> int:
    """Tasks that a row stands for: 5 for "16_[0-3,7%2]", 1 for a job."""
    return len(parse_tasks(job_id.partition("_")[2])) or 1 if job_id.endswith("]") else 1


def find_places(waiting: Iterable[Waiting], jobs: Mapping[str, SlurmJob]) -> dict[str, Place]:
    """The best place of each job over its partitions; none for one that does not wait, or is held (priority 0).

    The waiting rows are gone through once per partition, whatever the number of jobs.
    """
    ranked = {job_id: job for job_id, job in jobs.items() if job.pending and job.priority and job.partition}
    lines: dict[str, list[Waiting]] = {name: [] for job in ranked.values() for name in (job.partition or "").split(",")}
    for row in waiting if lines else ():
        for name in (row.partition,) if row.partition in lines else row.partition.split(","):
            if name in lines:
                lines[name].append(row)
    places: dict[str, Place] = {}
    for partition, rows in lines.items():
        here = {job_id: job for job_id, job in ranked.items() if partition in (job.partition or "").split(",")}
        for job_id, place in _go_down(partition, rows, here):
            if job_id not in places or place.rank < places[job_id].rank:
                places[job_id] = place
    return places


def _go_down(partition: str, rows: list[Waiting], jobs: Mapping[str, SlurmJob]) -> Iterator[tuple[str, Place]]:
    """From the highest priority to the lowest, with the sums of what was passed; a place for each job on the way."""
    pending = sum(row.tasks for row in rows)
    line = iter(sorted(rows, key=lambda row: -row.priority))
    row = next(line, None)
    of_user: dict[str, int] = {}
    ahead = nodes = gpus = 0
    gpu_seconds = 0
    for job_id, job in sorted(jobs.items(), key=lambda item: -(item[1].priority or 0)):
        while row is not None and row.priority > (job.priority or 0):
            wanted = row.tasks * _nodes(row.nodes)
            ahead += row.tasks
            nodes += wanted
            gpus += wanted * count_gpus(row.gpus)
            gpu_seconds += wanted * count_gpus(row.gpus) * _seconds(row.limit)
            of_user[row.user] = of_user.get(row.user, 0) + row.tasks
            row = next(line, None)
        hours = round(gpu_seconds / HOUR, 1)
        yield (
            job_id,
            Place(partition, ahead + 1, pending, len(of_user), nodes, gpus, hours, of_user.get(job.user or "", 0)),
        )


@cache
def count_gpus(text: str | None) -> int:
    """GPUs per node of "gres:gpu:a100:4" (up to 23.02) or "gres/gpu:a100:4" (from 23.11); 0 where none are named."""
    return sum(int(match[1] or 1) for match in _GPUS.finditer(text or ""))


@cache
def _nodes(text: str) -> int:
    """The nodes of %D: a number, or "1K" style on old versions' wide columns, or a range whose first counts."""
    match = re.match(r"\d+", text)
    return int(match[0]) if match else 1


@cache
def _seconds(text: str) -> int:
    try:
        return parse_duration(text)
    except ValueError:
        return 0
