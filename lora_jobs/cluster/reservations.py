"""Reservations: nodes that are kept for others, or for maintenance, and when."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from msgspec import Struct

from lora_jobs.cluster.inventory import parse_pairs
from lora_jobs.cluster.partition import ask_slurm

if TYPE_CHECKING:
    from collections.abc import Iterable

_HOSTS = re.compile(r"(?P<prefix>[^,\[\]]+)(?:\[(?P<numbers>[^\]]*)\])?(?P<suffix>[^,\[\]]*)")
MOST_NODES = 100_000


class Reservation(Struct, frozen=True):
    """One reservation: times local ISO, `nodes` as Slurm writes them (a host list)."""

    name: str
    start: str
    end: str
    nodes: str
    flags: str
    state: str

    def describe(self) -> str:
        """ "maint: lrdn0002, from 2026-11-21T10:00:00 to 2026-11-21T12:00:00, ACTIVE (MAINT)"."""
        flags = f" ({self.flags})" if self.flags else ""
        return f"{self.name}: {self.nodes or 'no nodes'}, from {self.start} to {self.end}, {self.state}{flags}"


def parse_reservations(text: str) -> list[Reservation]:
    """Reservations of `scontrol show reservation -o`, one a line; other lines are passed over."""
    found = []
    for line in text.splitlines():
        values = {key: "" if value == "(null)" else value for key, value in parse_pairs(line).items()}
        if name := values.get("ReservationName"):
            start, end = values.get("StartTime", "unknown"), values.get("EndTime", "unknown")
            nodes, flags, state = (values.get(key, "") for key in ("Nodes", "Flags", "State"))
            found.append(Reservation(name, start, end, nodes, flags, state or "unknown"))
    return found


def ask_reservations(nodes: Iterable[str], name: str | None, notes: list[str]) -> list[Reservation]:
    """The reservation `name`, and those that hold any of these nodes (host lists); a note when they can't be read."""
    text = ask_slurm(["scontrol", "show", "reservation", "-o"], "reservations", notes)
    here = {node for text in nodes for node in expand_nodes(text)}
    return [
        reservation
        for reservation in parse_reservations(text or "")
        if reservation.name == name or here & expand_nodes(reservation.nodes)
    ]


def expand_nodes(text: str) -> frozenset[str]:
    """The nodes of a host list: lrdn0001, lrdn0002 and big1 of "lrdn[0001-0002],big1". At most 100,000."""
    found: set[str] = set()
    for match in _HOSTS.finditer(text):
        if match["numbers"] is None:
            found.add(match["prefix"])
            continue
        for part in match["numbers"].split(","):
            first, _, last = part.partition("-")
            last = last or first
            if first.isdecimal() and last.isdecimal() and int(last) - int(first) < MOST_NODES - len(found):
                numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
                found.update(f"{match['prefix']}{number}{match['suffix']}" for number in numbers)
    return frozenset(found)
