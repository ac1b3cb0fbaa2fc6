"""The limits that a reason is about: those of QOS, or of an account and its user, by one sacctmgr."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lora_jobs.cluster.inventory import parse_partitions, split_table
from lora_jobs.cluster.partition import ask_slurm

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_GROUP = ("GrpJobs", "GrpSubmit", "GrpTRES", "GrpTRESMins", "GrpTRESRunMins", "GrpWall")
# Names of columns as src/sacctmgr/common.c knows them, the same in 20.11 to 25.05.
QOS_LIMITS = (
    *_GROUP, "MaxJobsPU", "MaxJobsPA", "MaxSubmitPU", "MaxSubmitPA", "MaxTRES", "MaxTRESPU", "MaxTRESPA",
    "MaxTRESPerNode", "MaxTRESMins", "MaxTRESRunMinsPU", "MaxTRESRunMinsPA", "MaxWall", "MinTRES",
)  # fmt: skip
ASSOCIATION_LIMITS = (*_GROUP, "MaxJobs", "MaxSubmit", "MaxTRES", "MaxTRESPerNode", "MaxTRESMins", "MaxWall")
QOS_LIMITS_FORMAT = ",".join(("Name", *QOS_LIMITS))
ASSOCIATION_LIMITS_FORMAT = ",".join(("Account", "User", "Partition", "ParentName", *ASSOCIATION_LIMITS))

# How the code of an account's limit begins, and where sacctmgr has that limit; the first that matches decides.
_NAMED = (
    (r"AssocGrpJobs", ("GrpJobs",)),
    (r"AssocGrpSubmit", ("GrpSubmit",)),
    (r"AssocGrpWall", ("GrpWall",)),
    (r"AssocGrp\w+RunMinutes", ("GrpTRESRunMins",)),
    (r"AssocGrp\w+Minutes", ("GrpTRESMins",)),
    (r"AssocGrp", ("GrpTRES",)),
    (r"AssocMaxJobs", ("MaxJobs",)),
    (r"AssocMaxSubmit", ("MaxSubmit",)),
    (r"AssocMaxWall", ("MaxWall",)),
    (r"AssocMax\w+Minutes", ("MaxTRESMins",)),
    (r"AssocMax\w+PerNode", ("MaxTRESPerNode",)),
    (r"AssocMax", ("MaxTRES",)),
    (r"AssociationJobLimit", ("GrpJobs", "MaxJobs")),
    (r"AssociationResourceLimit", ("GrpTRES", "MaxTRES")),
    (r"AssociationTimeLimit", ("GrpWall", "GrpTRESMins", "MaxWall", "MaxTRESMins")),
)


def find_association_limits(code: str) -> tuple[str, ...]:
    """The columns that hold the limit of an account that a reason's code names; none for another reason."""
    return next((columns for start, columns in _NAMED if re.match(start, code)), ())


def parse_qos_limits(text: str) -> dict[str, str]:
    """QOS of `sacctmgr -n -P show qos format=QOS_LIMITS_FORMAT`: its limits in one line, "" where it has none."""
    return {row["Name"]: _join(row, QOS_LIMITS) for row in split_table(text, QOS_LIMITS_FORMAT)}


def parse_association_limits(
    text: str, account: str, user: str, partition: str | None, columns: Sequence[str]
) -> list[tuple[str, str]]:
    """Whose limit and what it is, of `sacctmgr -n -P show assoc format=ASSOCIATION_LIMITS_FORMAT`.

    First the user's row, which has the limits per user that it inherits; then, for limits of a group, the account's own
    row (one without a user) and those of the accounts above it.
    """
    rows = split_table(text, ASSOCIATION_LIMITS_FORMAT)
    mine = [row for row in rows if (row["Account"], row["User"]) == (account, user)]
    mine = [row for row in mine if row["Partition"] in ("", partition)]
    found = [(f"{user} in {account}", limits) for row in mine if (limits := _join(row, columns))]
    groups = {row["Account"]: row for row in rows if not row["User"]}
    group = [column for column in columns if column.startswith("Grp")]
    while (row := groups.pop(account, None)) is not None:
        found += [(account, limits)] if (limits := _join(row, group)) else []
        account = row["ParentName"]
    return found


def ask_qos_limits(names: Sequence[str], notes: list[str]) -> list[tuple[str, str]]:
    """The limits of each of these QOS by one sacctmgr; a note when it can't be read."""
    argv = ["sacctmgr", "-n", "-P", "show", "qos", ",".join(names), f"format={QOS_LIMITS_FORMAT}"]
    found = parse_qos_limits(ask_slurm(argv, "limits of the QOS", notes) or "")
    return [(name, found[name] or "no limits of its own") for name in names if name in found]


def ask_partition_qos(partition: str, notes: list[str]) -> str | None:
    """The QOS whose limits hold for every job of the partition, by one scontrol; None where it has none."""
    text = ask_slurm(["scontrol", "-a", "show", "partition", partition, "-o"], "QOS of the partition", notes)
    rule = next((rule for rule in parse_partitions(text or "") if rule.name == partition), None)
    name = rule.raw.get("QoS", "N/A") if rule else "N/A"
    return None if name in ("", "N/A", "(null)") else name


def ask_association_limits(
    account: str, user: str, partition: str | None, cluster: str | None, code: str, notes: list[str]
) -> list[tuple[str, str]]:
    """The limits of the account that the reason names, by one sacctmgr; a note when they can't be read.

    Accounts have rows without a user; the one that sets the limit of a group may stand above the job's own.
    """
    columns = find_association_limits(code)
    of_group = any(column.startswith("Grp") for column in columns)
    where = ["user=", f"user={user}"] if of_group else [f"user={user}", f"account={account}"]
    where += [f"cluster={cluster}"] if cluster else []
    argv = ["sacctmgr", "-n", "-P", "show", "assoc", *where, f"format={ASSOCIATION_LIMITS_FORMAT}"]
    text = ask_slurm(argv, "limits of the account", notes)
    return parse_association_limits(text or "", account, user, partition, columns)


def _join(row: Mapping[str, str], columns: Sequence[str]) -> str:
    return ", ".join(f"{column} {row[column]}" for column in columns if row[column])
