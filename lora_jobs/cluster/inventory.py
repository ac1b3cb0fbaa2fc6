"""What a cluster has and allows: sinfo, scontrol and sacctmgr to values. What can't be read is a note."""

from __future__ import annotations

import os
import pwd
import re
from typing import TYPE_CHECKING

from msgspec import Struct, field

from lora_jobs.cluster.commands import find_query_seconds, run_command
from lora_jobs.cluster.parsers import parse_config
from lora_jobs.cluster.refusals import explain_refusal
from lora_jobs.errors import ClusterError, OutputError
from lora_jobs.units import parse_duration

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SINFO_FORMAT = "%R|%a|%l|%D|%c|%m|%T|%G|%f"
QOS_FORMAT = "Name,Priority,MaxWall,MaxTRES,MaxTRESPU,MaxJobsPU,MaxSubmitPU,GrpTRES,Flags"
ASSOCIATION_FORMAT = "Cluster,Account,Partition,QOS,MaxJobs,MaxSubmit,MaxWall,MaxTRES,GrpTRES"
_ASSOCIATION_LIMITS = ("MaxJobs", "MaxSubmit", "MaxWall", "MaxTRES", "GrpTRES")
PROGRAMS = ("sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo", "sacct", "sprio", "sacctmgr")

_EMPTY = frozenset({"", "(null)", "N/A", "n/a", "None", "NONE", "none"})
_GRES = re.compile(r"gpu(?::(?P<type>[A-Za-z][^:,()]*))?(?::(?P<count>\d+))?(?:\([^)]*\))?")
_PAIR = re.compile(r"(?P<key>[A-Za-z][A-Za-z0-9_/]*)=(?P<value>.*?)(?=\s+[A-Za-z][A-Za-z0-9_/]*=|\s*$)")
_VERSION = re.compile(r"\b(?P<version>\d+\.\d+(?:\.\d+)?\S*)")


class Gres(Struct, frozen=True):
    """GPUs of a node: Slurm's type word, None where the site gives none, and how many."""

    type: str | None
    count: int


class NodeGroup(Struct, frozen=True):
    """Nodes of one partition that are alike, as sinfo has them; memory in MB; None where Slurm says nothing."""

    partition: str
    available: str
    limit_seconds: int | None
    nodes: int
    cpus: int | None
    memory_mb: int | None
    state: str
    gpus: tuple[Gres, ...]
    features: tuple[str, ...]


class PartitionRules(Struct, frozen=True):
    """What scontrol says of a partition; `raw` is all of it."""

    name: str
    default: bool
    state: str
    limit_seconds: int | None
    max_nodes: int | None
    qos: tuple[str, ...] | None
    """Names that may be used here; None for any."""
    raw: Mapping[str, str]


class Qos(Struct, frozen=True):
    """A quality of service; None where it sets no limit."""

    name: str
    priority: int | None
    limit_seconds: int | None
    max_nodes: int | None
    raw: Mapping[str, str]


class Association(Struct, frozen=True):
    """An account that the user may charge, the partition it is bound to, and the QOS that go with it."""

    account: str
    partition: str | None
    qos: tuple[str, ...]
    limits: tuple[str, ...] = ()
    """As sacctmgr writes them: "MaxJobs 5"."""


class Inventory(Struct, frozen=True):
    """A whole cluster, as far as it could be read."""

    version: str | None = None
    config: Mapping[str, str] = field(default_factory=dict)
    groups: tuple[NodeGroup, ...] = ()
    partitions: tuple[PartitionRules, ...] = ()
    qos: tuple[Qos, ...] = ()
    associations: tuple[Association, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def cluster(self) -> str | None:
        return self.config.get("ClusterName")

    def find_groups(self, partition: str) -> tuple[NodeGroup, ...]:
        return tuple(group for group in self.groups if group.partition == partition)

    def list_partitions(self) -> tuple[str, ...]:
        """Names, the default one first."""
        rules = sorted(self.partitions, key=lambda rule: not rule.default)
        return tuple(dict.fromkeys([rule.name for rule in rules] + [group.partition for group in self.groups]))


def find_user() -> str:
    """My name as Slurm knows it: that of the user id, whatever $USER says."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def read_inventory(user: str) -> Inventory:
    """Ask sinfo once, scontrol and sacctmgr once per table that they have. Never raises for a Slurm that is away."""
    notes: list[str] = []
    config = _ask(["scontrol", "show", "config"], "configuration", notes)
    if config is None:
        # Each further question would wait as long again for a controller that is away; the version needs none.
        return Inventory(
            version=parse_version(_ask(["sinfo", "--version"], "version", notes) or ""), notes=tuple(notes)
        )
    groups = _ask(["sinfo", "-h", "-e", "-o", SINFO_FORMAT], "nodes", notes)
    rules = _ask(["scontrol", "show", "partition", "-o"], "partitions", notes)
    values = parse_config(config)
    qos = associations = None
    if values.get("AccountingStorageType", "").endswith("slurmdbd"):
        qos = _ask(["sacctmgr", "-n", "-P", "show", "qos", f"format={QOS_FORMAT}"], "QOS", notes)
        argv = ["sacctmgr", "-n", "-P", "show", "assoc", f"user={user}", f"format={ASSOCIATION_FORMAT}"]
        associations = _ask(argv, "my accounts", notes)
    try:
        node_groups = tuple(parse_sinfo(groups or ""))
    except OutputError as error:
        node_groups = ()
        notes.append(f"nodes not readable: {error.message}")
    return Inventory(
        version=parse_version(values.get("SLURM_VERSION", "")),
        config=values,
        groups=node_groups,
        partitions=tuple(parse_partitions(rules or "")),
        qos=tuple(parse_qos(qos or "")),
        associations=tuple(parse_associations(associations or "", values.get("ClusterName"))),
        notes=tuple(notes),
    )


def _ask(argv: Sequence[str], what: str, notes: list[str]) -> str | None:
    try:
        answer = run_command(argv, timeout=find_query_seconds())
    except ClusterError as error:
        notes.append(f"{what} not readable: {error.message}")
        return None
    if answer.returncode != 0:
        notes.append(f"{what} not readable: {explain_refusal(answer.stderr or answer.stdout).message}")
        return None
    return answer.stdout


def parse_version(text: str) -> str | None:
    """ "22.05.8" of "slurm-wlm 22.05.8" or "slurm 23.11.10-1"."""
    match = _VERSION.search(text)
    return match["version"] if match else None


def parse_gres(text: str) -> tuple[Gres, ...]:
    """GPUs of "gpu:a100:4(S:0-1),gpu:v100:2,nvme:1"; a count left out is one."""
    found = []
    for match in _GRES.finditer(text):
        before = text[: match.start()]
        if before and not before.endswith(","):
            continue
        found.append(Gres(match["type"], int(match["count"] or 1)))
    return tuple(gres for gres in found if gres.count)


def parse_sinfo(text: str) -> list[NodeGroup]:
    """Groups of `sinfo -h -e -o SINFO_FORMAT`; other lines are passed over. Errors: OutputError when none is one."""
    lines = [line for line in text.splitlines() if line.strip()]
    columns = SINFO_FORMAT.count("|") + 1
    groups = []
    for line in lines:
        parts = [part.strip() for part in line.split("|", maxsplit=columns - 1)]
        if len(parts) != columns or not parts[3].isdecimal():
            continue
        partition, available, limit, nodes, cpus, memory, state, gres, features = parts
        groups.append(
            NodeGroup(
                partition=partition.rstrip("*"),
                available=available,
                limit_seconds=_duration(limit),
                nodes=int(nodes),
                cpus=_integer(cpus),
                memory_mb=_integer(memory),
                state=state,
                gpus=parse_gres("" if gres in _EMPTY else gres),
                features=tuple(_split(features)),
            )
        )
    if lines and not groups:
        raise OutputError(f"sinfo answered something that is no list of nodes: {lines[0][:200]!r}", line=lines[0])
    return groups


def parse_partitions(text: str) -> list[PartitionRules]:
    """Partitions of `scontrol show partition -o`, one a line."""
    found = []
    for line in text.splitlines():
        values = parse_pairs(line)
        if "PartitionName" not in values:
            continue
        allowed = values.get("AllowQos", "ALL")
        found.append(
            PartitionRules(
                name=values["PartitionName"],
                default=values.get("Default") == "YES",
                state=values.get("State", "UNKNOWN"),
                limit_seconds=_duration(values.get("MaxTime", "")),
                max_nodes=_integer(values.get("MaxNodes", "")),
                qos=None if allowed == "ALL" else tuple(_split(allowed)),
                raw=values,
            )
        )
    return found


def parse_pairs(line: str) -> dict[str, str]:
    """ "A=1 B=two words C=" as a dict; a value goes on until the next key."""
    return {match["key"]: match["value"].strip() for match in _PAIR.finditer(line)}


def parse_qos(text: str) -> list[Qos]:
    """QOS of `sacctmgr -n -P show qos format=QOS_FORMAT`."""
    found = []
    for values in split_table(text, QOS_FORMAT):
        nodes = re.search(r"(?:^|,)node=(\d+)", values["MaxTRES"])
        found.append(
            Qos(
                name=values["Name"],
                priority=_integer(values["Priority"]),
                limit_seconds=_duration(values["MaxWall"]),
                max_nodes=int(nodes[1]) if nodes else None,
                raw={key: value for key, value in values.items() if value},
            )
        )
    return found


def parse_associations(text: str, cluster: str | None = None) -> list[Association]:
    """My accounts of `sacctmgr -n -P show assoc user=ME format=ASSOCIATION_FORMAT`, on this cluster only."""
    return [
        Association(
            values["Account"],
            values["Partition"] or None,
            tuple(_split(values["QOS"])),
            tuple(f"{key} {value}" for key in _ASSOCIATION_LIMITS if (value := values[key])),
        )
        for values in split_table(text, ASSOCIATION_FORMAT)
        if cluster is None or values["Cluster"] == cluster
    ]


def split_table(text: str, columns: str) -> list[dict[str, str]]:
    """Rows with as many fields as asked for; other lines (site banners) are passed over."""
    names = columns.split(",")
    rows = [line.split("|") for line in text.splitlines()]
    return [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names) and row[0].strip()]


def _split(text: str) -> list[str]:
    return [] if text in _EMPTY else [word for word in re.split(r"[,\s]+", text) if word]


def _integer(text: str) -> int | None:
    """Also "32+", which sinfo writes for unlike nodes: the smallest of them."""
    digits = text.strip().rstrip("+")
    return int(digits) if digits.isdecimal() else None


def _duration(text: str) -> int | None:
    """Seconds; None for infinite, UNLIMITED, n/a."""
    try:
        return parse_duration(text)
    except ValueError:
        return None
