"""The nodes of one partition as sinfo shows them: numbers behind a reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from lora_jobs.cluster.commands import find_query_seconds, run_command
from lora_jobs.cluster.refusals import explain_refusal
from lora_jobs.errors import ClusterError, OutputError
from lora_jobs.units import parse_duration

if TYPE_CHECKING:
    from collections.abc import Sequence

# The reason that an administrator wrote comes last: it is the one column that may hold the separator.
NODES_FORMAT = "%R|%a|%l|%s|%D|%T|%N|%E"
_FLAGS = "*~#!%$@^-+"
_AWAY = ("drain", "down", "fail", "maint", "reserved", "unknown", "reboot", "blocked", "inval")


class PartitionView(Struct, frozen=True):
    """One partition now: nodes by state, those that take no job with the reason given, and its limits."""

    name: str
    available: str
    nodes: int
    states: dict[str, int]
    away: tuple[str, ...]
    limit_seconds: int | None
    max_nodes: int | None
    hosts: tuple[str, ...] = ()
    """Host lists, as Slurm writes them."""


def parse_partition(text: str) -> PartitionView | None:
    """The view of `sinfo -h -p NAME -o NODES_FORMAT`; None where it lists nothing. Errors: OutputError."""
    lines = [line for line in text.splitlines() if line.strip()]
    rows = [[part.strip() for part in line.split("|", maxsplit=7)] for line in lines]
    rows = [row for row in rows if len(row) == 8 and row[4].isdecimal()]
    if not rows:
        if lines:
            raise OutputError(f"sinfo answered something that is no list of nodes: {lines[0][:200]!r}", line=lines[0])
        return None
    states: dict[str, int] = {}
    away = []
    for _, _, _, _, number, state, names, why in rows:
        word = state.rstrip(_FLAGS)
        states[word] = states.get(word, 0) + int(number)
        if word.startswith(_AWAY) or state.endswith("*"):
            said = "" if why in ("", "none", "(null)") else f": {why}"
            silent = ", not answering" if state.endswith("*") else ""
            away.append(f"{names} {word}{silent}{said}")
    most = rows[0][3].rpartition("-")[2]
    return PartitionView(
        name=rows[0][0].rstrip("*"),
        available=rows[0][1],
        nodes=sum(states.values()),
        states=states,
        away=tuple(away),
        limit_seconds=_seconds(rows[0][2]),
        max_nodes=int(most) if most.isdecimal() else None,
        hosts=tuple(row[6] for row in rows),
    )


def ask_partition(name: str, notes: list[str]) -> PartitionView | None:
    """The partition by one sinfo; None, and a note, when it can't be read."""
    text = ask_slurm(["sinfo", "-h", "-p", name, "-o", NODES_FORMAT], "nodes", notes) if name else None
    try:
        return parse_partition(text or "")
    except OutputError as error:
        notes.append(f"nodes not readable: {error.message}")
        return None


def ask_slurm(argv: Sequence[str], what: str, notes: list[str]) -> str | None:
    """The answer to one question; None, and a note that names `what`, when there is none."""
    try:
        answer = run_command(argv, timeout=find_query_seconds())
        if answer.returncode == 0:
            return answer.stdout
        notes.append(f"{what} not readable: {explain_refusal(answer.stderr or answer.stdout).message}")
    except ClusterError as error:
        notes.append(f"{what} not readable: {error.message}")
    return None


def _seconds(text: str) -> int | None:
    try:
        return parse_duration(text)
    except ValueError:
        return None
