"""The lines of a diagnosis about Slurm: its commands, plugins, partitions, and what I may use."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lora_jobs.cluster.commands import find_command
from lora_jobs.cluster.inventory import PROGRAMS, Inventory, find_user
from lora_jobs.units import format_duration, parse_duration
from lora_jobs.workflows.findings import Finding, Level, split_version

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lora_jobs.spec import ClusterEnvironment


def look_at_slurm(inventory: Inventory | None) -> Iterator[Finding]:
    if inventory is None:
        yield Finding(
            "slurm",
            "Slurm",
            "warning",
            "not here: jobs run on this machine only",
            "log in to a login node of a cluster",
        )
        return
    yield _look_at_version(inventory.version)
    missing = [program for program in PROGRAMS if find_command(program) is None]
    if missing:
        level: Level = "wrong" if {"sbatch", "srun", "squeue", "scontrol"} & set(missing) else "warning"
        yield Finding(
            "slurm", "commands", level, f"not on PATH: {', '.join(missing)}", "load the cluster's Slurm module"
        )
    else:
        yield Finding("slurm", "commands", "ok", ", ".join(PROGRAMS))
    for note in inventory.notes:
        if inventory.config:
            hint = "its lines are missing here; try again, and ask the cluster's support where it stays so"
            yield Finding("slurm", "answers", "warning", note, hint)
        else:
            hint = "`scontrol ping` says whether the controller answers; try again, or on another login node"
            yield Finding("slurm", "answers", "wrong", note, hint)
    if inventory.config:
        yield from _look_at_config(inventory)


def _look_at_version(version: str | None) -> Finding:
    if version is None:
        return Finding("slurm", "version", "warning", "not readable", "`sinfo --version` should say it")
    numbers = split_version(version)
    if numbers < (20, 11):
        return Finding(
            "slurm",
            "version",
            "warning",
            f"{version}: older than what this is written for (20.11)",
            "`lora-jobs render SPEC -o DIR`, then `sbatch --test-only` on its script; what is not readable is left out",
        )
    return Finding("slurm", "version", "ok", version)


def _look_at_config(inventory: Inventory) -> Iterator[Finding]:
    config = inventory.config
    yield Finding("slurm", "controller", "ok", f"cluster {inventory.cluster or '?'} answers")
    yield _look_at_accounting(config)
    yield _look_at_priority(config)
    yield _look_at_scheduler(config)
    known = [f"{key} {config[key]}" for key in ("MaxArraySize", "MaxJobCount", "EnforcePartLimits") if key in config]
    yield Finding("slurm", "limits", "ok", ", ".join(known) or "none named")
    private = config.get("PrivateData", "none")
    if "jobs" in private:
        yield Finding(
            "slurm", "privacy", "warning",
            f"PrivateData={private}: others' jobs are hidden, so is the rank in the queue",
            "nothing to do: expected starts are right all the same, `lora-jobs plan SPEC` compares them",
        )  # fmt: skip
    preempt = config.get("PreemptType", "preempt/none")
    if preempt != "preempt/none":
        mode = config.get("PreemptMode", "?")
        yield Finding("slurm", "preemption", "ok", f"{preempt}, {mode}: a preempted run saves, and goes on by itself")


def _look_at_accounting(config: Mapping[str, str]) -> Finding:
    storage = config.get("AccountingStorageType", "?")
    if storage.endswith("slurmdbd"):
        enforced = config.get("AccountingStorageEnforce", "none")
        return Finding("slurm", "accounting", "ok", f"slurmdbd; enforced: {enforced}")
    return Finding(
        "slurm", "accounting", "warning", f"{storage}: Slurm forgets ended jobs",
        "nothing to do: the runs' own records are used",
    )  # fmt: skip


def _look_at_priority(config: Mapping[str, str]) -> Finding:
    priority = config.get("PriorityType", "?")
    if priority != "priority/multifactor":
        return Finding(
            "slurm", "priority", "warning", f"{priority}: no factors to show", "jobs start in the order of priority"
        )
    weights = {
        key.removeprefix("PriorityWeight").lower(): value
        for key, value in config.items()
        if key.startswith("PriorityWeight") and value not in {"", "0", "(null)"}
    }
    shown = ", ".join(f"{name} {weight}" for name, weight in weights.items()) or "all weights are 0"
    return Finding("slurm", "priority", "ok", f"multifactor: {shown}")


def _look_at_scheduler(config: Mapping[str, str]) -> Finding:
    scheduler = config.get("SchedulerType", "?")
    if scheduler == "sched/backfill":
        return Finding("slurm", "scheduler", "ok", "backfill: expected starts are computed")
    return Finding(
        "slurm", "scheduler", "warning", f"{scheduler}: squeue gives no expected starts", "`lora-jobs plan` asks anyway"
    )


def look_at_partitions(inventory: Inventory | None, environment: ClusterEnvironment | None) -> Iterator[Finding]:
    if inventory is None or not inventory.list_partitions():
        return
    known = environment.partitions if environment else {}
    for name in inventory.list_partitions():
        yield _look_at_partition(name, inventory, known)
    if environment is None:
        cluster = inventory.cluster or "NAME"
        yield Finding(
            "partitions",
            "envs",
            "warning",
            "no file of envs/ describes this cluster",
            f"lora-jobs clusters init {cluster}",
        )
        return
    yield Finding("partitions", "envs", "ok", f"{environment.name}: {environment.file}")
    for name, partition in environment.partitions.items():
        groups = inventory.find_groups(name)
        rule = next((rule for rule in inventory.partitions if rule.name == name), None)
        if not groups and rule is None:
            yield Finding(
                "partitions", name, "warning", f"in {environment.file}, but not on this cluster", "take it out"
            )
            continue
        most = max((gres.count for group in groups for gres in group.gpus), default=None)
        if most is not None and partition.gpus_per_node is not None and partition.gpus_per_node > most:
            message = f"{environment.file} says {partition.gpus_per_node} GPUs a node, Slurm {most}"
            yield Finding("partitions", name, "wrong", message, "correct gpus_per_node there")
        limit = rule.limit_seconds if rule else None
        if limit and partition.max_time and parse_duration(partition.max_time) > limit:
            message = f"{environment.file} says max_time {partition.max_time}, Slurm {format_duration(limit)}"
            yield Finding("partitions", name, "wrong", message, "correct max_time there")


def _look_at_partition(name: str, inventory: Inventory, known: Any) -> Finding:
    """Nodes, GPUs and where they are known from, the limit, and whether any node is there to be used."""
    groups = inventory.find_groups(name)
    rule = next((rule for rule in inventory.partitions if rule.name == name), None)
    nodes = sum(group.nodes for group in groups)
    kinds = dict.fromkeys(f"{gres.count} x {gres.type or 'gpu'}" for group in groups for gres in group.gpus)
    features = dict.fromkeys(feature for group in groups for feature in group.features)
    if kinds:
        gpus = f"{' or '.join(kinds)} a node (GRES)"
    elif name in known and known[name].gpu:
        gpus = f"{known[name].gpus_per_node or '?'} x {known[name].gpu} a node (envs/; Slurm lists no GRES)"
    elif features:
        gpus = f"no GRES; features {', '.join(features)}"
    else:
        gpus = "no GPUs"
    limit = rule.limit_seconds if rule else None
    parts = [_count_nodes(nodes), gpus, f"limit {format_duration(limit)}" if limit else "no time limit"]
    if rule is not None and rule.max_nodes:
        parts.append(f"at most {_count_nodes(rule.max_nodes)} a job")
    states: dict[str, int] = {}
    for group in groups:
        states[group.state] = states.get(group.state, 0) + group.nodes
    parts.append(", ".join(f"{count} {state}" for state, count in states.items()) or "no nodes")
    message = "; ".join(parts)
    if rule is not None and rule.state != "UP":
        return Finding("partitions", name, "warning", f"{rule.state}; {message}", "choose another partition for now")
    away = sum(count for state, count in states.items() if re.match(r"down|drain|fail|maint|unk|inval|\w+\*", state))
    if nodes and away == nodes:
        return Finding("partitions", name, "warning", message, "no node can take a job now: choose another partition")
    return Finding("partitions", name, "ok", message)


def look_at_accounts(inventory: Inventory | None, environment: ClusterEnvironment | None) -> Iterator[Finding]:
    if inventory is None or not inventory.config.get("AccountingStorageType", "").endswith("slurmdbd"):
        return
    enforced = "associations" in inventory.config.get("AccountingStorageEnforce", "")
    if not inventory.associations:
        level: Level = "wrong" if enforced else "warning"
        yield Finding(
            "accounts", "accounts", level, f"{find_user()} has none on {inventory.cluster}",
            "ask your project's leader to add you; jobs will be refused" if enforced
            else "leave resources.account out; ask your project's leader where hours are to be booked on one",
        )  # fmt: skip
    for association in inventory.associations:
        where = f" in {association.partition}" if association.partition else ""
        limited = "".join(f"; {limit}" for limit in association.limits)
        message = f"{association.account}{where}; QOS {', '.join(association.qos) or 'none'}{limited}"
        yield Finding("accounts", "account", "ok", message)
    mine = {name for association in inventory.associations for name in association.qos}
    for qos in inventory.qos:
        if qos.name not in mine:
            continue
        limits = [f"{key} {value}" for key, value in qos.raw.items() if key not in {"Name", "Priority", "Flags"}]
        priority = f"priority {qos.priority}" if qos.priority is not None else ""
        yield Finding("accounts", f"qos {qos.name}", "ok", "; ".join(filter(None, [priority, *limits])) or "no limits")
    if enforced and environment is not None and not environment.account_required and environment.scheduler == "slurm":
        yield Finding(
            "accounts", "envs", "warning", f"{environment.file} does not ask for an account, Slurm does",
            "set account_required: true there",
        )  # fmt: skip


def _count_nodes(number: int) -> str:
    return "1 node" if number == 1 else f"{number} nodes"
