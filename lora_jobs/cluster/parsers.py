"""Slurm's text to values. Columns are asked for by explicit format, so only words, times and numbers vary."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from msgspec import Struct

from lora_jobs.errors import OutputError
from lora_jobs.units import parse_duration

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

# The job's name comes last: it is the one column that may hold the separator.
QUEUE_FORMAT = "%i|%T|%r|%P|%u|%a|%q|%Q|%V|%S|%M|%l|%D|%b|%N|%E|%v|%j"
SPRIO_FORMAT = "%i|%Y|%A|%F|%J|%P|%Q|%T|%S|%N|%B"
SACCT_FORMAT = (
    "JobID,State,ExitCode,Reason,Partition,User,Account,QOS,Priority,Submit,Start,End,ElapsedRaw,Timelimit,NNodes,"
    "NodeList,JobName"
)

_JOB_ID = re.compile(r"\d+(_(\d+|\[[^\]]*\]))?(\+\d+)?")
_PLAIN_ID = re.compile(r"\d+(_\d+)?(\+\d+)?")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")
_TEST_ONLY = re.compile(r"Job \d+ to start at (?P<start>\S+)( on cluster \S+)?( a)? using \d+ processors on ")
_SUBMITTED = re.compile(r"(?P<job_id>\d+)(;[A-Za-z0-9_.-]+)?")
_EMPTY = frozenset(
    {"", "N/A", "n/a", "None", "none", "(null)", "Unknown", "UNKNOWN", "None assigned", "NONE", "INVALID"}
)
_CONFIG = re.compile(r"^(?P<key>[A-Za-z_][A-Za-z0-9_\[\]]*)\s*=(?P<value>.*)$", re.MULTILINE)
# Not CONFIGURING: such a job holds its nodes, which boot.
PENDING_STATES = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "SPECIAL_EXIT"})


class Factors(Struct, frozen=True):
    """The weighted parts that a pending job's priority is the sum of. Source: sprio(1)."""

    priority: int
    age: int
    fairshare: int
    job_size: int
    partition: int
    qos: int
    tres: int
    site: int
    nice: int
    association: int


class SlurmJob(Struct, frozen=True):
    """One job as Slurm shows it; None where Slurm says nothing. Times as Slurm writes them (local, ISO), in seconds."""

    job_id: str
    state: str
    reason: str | None
    partition: str | None
    user: str | None
    account: str | None
    qos: str | None
    priority: int | None
    submitted: str | None
    started: str | None
    expected_start: str | None
    ended: str | None
    elapsed_seconds: int | None
    limit_seconds: int | None
    nodes: int | None
    gpus: str | None
    node_list: str | None
    name: str
    exit_code: str | None
    source: Literal["squeue", "sacct"]
    factors: Factors | None = None
    dependency: str | None = None
    reservation: str | None = None

    @property
    def pending(self) -> bool:
        return self.state in PENDING_STATES


def is_job_id(text: str) -> bool:
    """True for one job or array task as Slurm names it: 123, 123_4, 123+1."""
    return _PLAIN_ID.fullmatch(text) is not None


def parse_state(text: str) -> str:
    """The state's word: "CANCELLED by 1001" and "CANCELLED+" are CANCELLED; a word we don't know stays as it is."""
    words = text.split()
    return words[0].rstrip("+").upper() if words else "UNKNOWN"


def read_queued_job(row: Sequence[str]) -> SlurmJob:
    """One job of the columns of QUEUE_FORMAT."""
    (job_id, raw_state, reason, partition, user, account, qos, priority, submitted, start, elapsed, limit, nodes,
     gpus, node_list, dependency, reservation, name) = row  # fmt: skip
    state = parse_state(raw_state)
    waits = state in PENDING_STATES
    return SlurmJob(
        job_id=job_id,
        state=state,
        reason=_word(reason),
        partition=_word(partition),
        user=_word(user),
        account=_word(account),
        qos=_word(qos),
        priority=_integer(priority),
        submitted=_time(submitted),
        started=None if waits else _time(start),
        expected_start=_time(start) if waits else None,
        ended=None,
        elapsed_seconds=_duration(elapsed),
        limit_seconds=_duration(limit),
        nodes=_integer(nodes),
        gpus=_word(gpus),
        node_list=_word(node_list),
        name=name,
        exit_code=None,
        source="squeue",
        dependency=_word(dependency),
        reservation=_word(reservation),
    )


def parse_sacct(text: str) -> list[SlurmJob]:
    """Jobs of `sacct -X -P -n -o SACCT_FORMAT`. Errors: OutputError when there is text and no job in it.

    A requeued job may have a row per attempt; callers take the last.
    """
    jobs = []
    for row in split_rows(text, columns=SACCT_FORMAT.count(",") + 1, program="sacct"):
        (job_id, raw_state, exit_code, reason, partition, user, account, qos, priority, submitted, start, end, elapsed,
         limit, nodes, node_list, name) = row  # fmt: skip
        state = parse_state(raw_state)
        jobs.append(
            SlurmJob(
                job_id=job_id,
                state=state,
                reason=_word(reason),
                partition=_word(partition),
                user=_word(user),
                account=_word(account),
                qos=_word(qos),
                priority=_integer(priority),
                submitted=_time(submitted),
                started=_time(start),
                expected_start=None,
                ended=_time(end),
                elapsed_seconds=_integer(elapsed),
                limit_seconds=_duration(limit),
                nodes=_integer(nodes),
                gpus=None,
                node_list=_word(node_list),
                name=name,
                exit_code=_word(exit_code),
                source="sacct",
            )
        )
    return jobs


def parse_sprio(text: str) -> dict[str, Factors]:
    """Factors by job id, of `sprio -h -o SPRIO_FORMAT`; of a job in several partitions where it stands highest.

    Errors: OutputError when there is text and no job in it.
    """
    found: dict[str, Factors] = {}
    for row in split_rows(text, columns=SPRIO_FORMAT.count("|") + 1, program="sprio"):
        job_id, priority, age, fairshare, job_size, partition, qos, tres, site, nice, association = row
        factors = Factors(
            priority=_integer(priority) or 0,
            age=_integer(age) or 0,
            fairshare=_integer(fairshare) or 0,
            job_size=_integer(job_size) or 0,
            partition=_integer(partition) or 0,
            qos=_integer(qos) or 0,
            tres=sum(_integer(part.rpartition("=")[2]) or 0 for part in tres.split(",")),
            site=_integer(site) or 0,
            nice=_integer(nice) or 0,
            association=_integer(association) or 0,
        )
        if job_id not in found or factors.priority > found[job_id].priority:
            found[job_id] = factors
    return found


def parse_test_only(text: str) -> str | None:
    """The start that `sbatch --test-only` forecasts; None where there is none.

    25.05 writes a stray " a ", and names the cluster where --clusters was given (src/api/allocate.c).
    """
    match = _TEST_ONLY.search(text)
    return None if match is None else _time(match["start"])


def parse_submitted(text: str) -> str:
    """The job id of `sbatch --parsable`, ID or ID;CLUSTER: the last line that is one, since sites print banners.

    Errors: OutputError when no line is one.
    """
    for line in reversed(text.splitlines()):
        if (match := _SUBMITTED.fullmatch(line.strip())) is not None:
            return match["job_id"]
    line = (text.strip().splitlines() or [""])[-1][:200]
    raise OutputError(
        f"sbatch ended well but gave no job id: {line!r}",
        line=line,
        hint="`squeue --me` shows whether the job is queued; scancel it before submitting again",
    )


def parse_config(text: str) -> dict[str, str]:
    """ "Key = value" lines of `scontrol show config`."""
    return {match["key"]: match["value"].strip() for match in _CONFIG.finditer(text)}


def match_ids(row_id: str, wanted: Collection[str]) -> list[str]:
    """Which of the jobs a row of Slurm stands for: itself, the tasks of "12_[0-3,7%2]" one by one, and their array.

    A set or dict as `wanted` makes this one look-up per task, however many jobs are asked for.
    """
    base, _, tasks = row_id.partition("_")
    found = [job_id for job_id in dict.fromkeys((row_id, base)) if job_id in wanted]
    if tasks.startswith("["):
        found += [job_id for task in parse_tasks(tasks) if (job_id := f"{base}_{task}") in wanted]
    return found


def parse_tasks(text: str) -> set[int]:
    """Task numbers of "[0-3,7,10-20:5%2]"; "..." (a list that Slurm cut short) adds nothing."""
    tasks: set[int] = set()
    for part in text.strip("[]").partition("%")[0].split(","):
        span, _, step = part.partition(":")
        first, dash, last = span.partition("-")
        if first.isdecimal() and (last.isdecimal() or not dash):
            tasks.update(range(int(first), int(last or first) + 1, int(step) if step.isdecimal() and int(step) else 1))
    return tasks


def split_rows(text: str, *, columns: int, program: str) -> list[list[str]]:
    """Rows with `columns` fields whose first is a job id; other lines (site banners) are passed over."""
    lines = [line for line in text.splitlines() if line.strip()]
    rows = [line.split("|", maxsplit=columns - 1) for line in lines]
    good = [row for row in rows if len(row) == columns and _JOB_ID.fullmatch(row[0].strip()) is not None]
    if lines and not good:
        raise OutputError(f"{program} answered something that is no list of jobs: {lines[0][:200]!r}", line=lines[0])
    return [[field.strip() for field in row] for row in good]


def _word(text: str) -> str | None:
    return None if text in _EMPTY else text


def _time(text: str) -> str | None:
    return text if _TIME.fullmatch(text) else None


def _integer(text: str) -> int | None:
    return int(text) if text.isdecimal() or (text[:1] == "-" and text[1:].isdecimal()) else None


def _duration(text: str) -> int | None:
    """Seconds; None for UNLIMITED, Partition_Limit, NOT_SET, INVALID."""
    try:
        return parse_duration(text)
    except ValueError:
        return None
