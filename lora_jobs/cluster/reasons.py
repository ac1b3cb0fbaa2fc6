"""Why Slurm lets a job wait, or ended it: every reason code in plain words, and what its user can do.

Codes: Slurm's "Job Reason Codes" page (24.11) and what 22.05 to 25.11 can print; tests hold that none is missing. Codes
of limits are composed (QOS or Assoc, Grp or Max or Min, a resource, a scope), so they are explained by their parts.
"""

from __future__ import annotations

import re
from typing import Literal

from msgspec import Struct

Actor = Literal["wait", "you", "admin"]


class Reason(Struct, frozen=True):
    """A code as Slurm spells it, what it means, what to do, and whose turn it is."""

    code: str
    short: str
    meaning: str
    advice: str
    turn: Actor = "wait"
    known: bool = True


_WAIT = "nothing to do: the job goes on by itself"
_QOS = "`sacctmgr show qos format=name,maxwall,maxtres,maxtrespu,maxjobspu,maxsubmitpu,grptres` lists the limits"
_ASSOC = "`sacctmgr show assoc user=$USER format=account,partition,qos,grptres,maxtres,maxjobs,maxsubmit` lists them"
_SUPPORT = "ask the cluster's support; lora-jobs resume submits the run anew once it is mended"
_RESUBMIT = "lora-jobs cancel, then lora-jobs resume with the value changed by --set"

REASONS: tuple[Reason, ...] = (
    # The queue at work.
    Reason(
        "None",
        "not looked at yet",
        "the scheduler has not looked at the job yet, or is looking at it again",
        "nothing to do: look again in a minute",
    ),
    Reason(
        "Priority",
        "others go first",
        "other jobs of the partition have a higher priority and are served first",
        "wait, or ask for less: a shorter resources.time or fewer GPUs lets backfill start it in a gap "
        "(lora-jobs plan compares)",
    ),
    Reason(
        "Resources",
        "next, waits for free nodes",
        "next in line, and the nodes, GPUs, cores or memory it asks for are in use",
        "wait for running jobs to end, or ask for less (lora-jobs plan compares)",
    ),
    Reason("Prolog", "nodes being made ready", "its nodes are being made ready (the prolog program runs)", _WAIT),
    Reason(
        "Cleaning",
        "cleaning up after a requeue",
        "it was requeued and its earlier start is still being cleaned up",
        _WAIT,
    ),
    Reason(
        "Licenses",
        "waits for a license",
        "it waits for a software license that is in use",
        "wait, or submit without the license",
    ),
    Reason(
        "Constraints",
        "waits for nodes with its features",
        "the nodes with the features it asks for can't be given now",
        "wait, or change resources.constraint",
    ),
    Reason("FedJobLock", "federation decides", "the clusters of the federation agree on who runs it", _WAIT),
    Reason(
        "SchedDefer",
        "no immediate start here",
        "this cluster starts no job at once (SchedulerParameters=defer)",
        "submit it as a batch job",
    ),
    # Time.
    Reason(
        "BeginTime",
        "rests until its begin time",
        "its earliest start has not come: it was asked for with --begin, or the job was requeued and rests for "
        "about two minutes",
        "nothing to do: after a requeue it becomes eligible by itself",
    ),
    Reason(
        "DeadLine",
        "can't meet its deadline",
        "it can't end before the deadline that it was given",
        f"{_RESUBMIT}, or without a deadline",
        "you",
    ),
    Reason(
        "Reservation",
        "waits for its reservation",
        "it waits for the reservation that it asks for to begin or to have room",
        "`scontrol show reservation` says when it begins; without the reservation the job joins the normal queue",
    ),
    Reason(
        "ReservationDeleted",
        "its reservation is gone",
        "the reservation that it asks for is gone",
        "lora-jobs cancel, then submit without the reservation",
        "you",
    ),
    Reason(
        "ReservationInvalid",
        "its reservation can't be used",
        "the reservation that it asks for can't be used by it: another user's, account's or partition's, or over",
        "lora-jobs cancel, then submit without the reservation; `scontrol show reservation` says whose it is",
        "you",
    ),
    Reason(
        "MaxPoweredUpNodes",
        "waits for nodes to be switched on",
        "as many nodes are switched on as the site allows at a time",
        "wait for running jobs to end",
    ),
    Reason("MpiPortsBusy", "waits for MPI's ports", "the ports kept for MPI are in use on its nodes", _WAIT),
    Reason(
        "NvidiaImexChannels",
        "waits for an IMEX channel",
        "the channels by which GPUs of several nodes share memory (NVIDIA IMEX) are in use by other jobs",
        "wait for one to end",
    ),
    # What Slurm prints for a number that it has no word for.
    *(
        Reason(
            code,
            "no reason that Slurm knows",
            "Slurm gives a reason that it has no word for itself",
            "`scontrol show job JOBID` may say more",
        )
        for code in ("InvalidReason", "InvaildReason")
    ),
    # Held.
    Reason(
        "JobHeldUser",
        "held by you",
        "held by you or by a coordinator of your account",
        "`scontrol release JOBID` lets it go on",
        "you",
    ),
    Reason(
        "JobHeldAdmin",
        "held by an administrator",
        "held by an administrator; only they can release it",
        "ask the cluster's support",
        "admin",
    ),
    Reason(
        "JobHoldMaxRequeue",
        "held: requeued too often",
        "held: it was requeued as often as the cluster allows (MaxBatchRequeue)",
        "`lora-jobs logs` shows why it kept coming back; lora-jobs cancel and resume submit it anew",
        "you",
    ),
    Reason(
        "Dependency",
        "waits for another job",
        "it waits for another job to end, as it was asked to (--dependency)",
        "wait for that job; `scontrol update JobId=JOBID Dependency=` takes the condition away",
    ),
    Reason(
        "DependencyNeverSatisfied",
        "its dependency can't be met",
        "the job that it waits for ended in a way that can never meet the condition",
        "`scontrol update JobId=JOBID Dependency=` takes the condition away, or lora-jobs cancel",
        "you",
    ),
    Reason(
        "JobArrayTaskLimit",
        "array's task limit",
        "as many tasks of its array run as the array allows (the number after %)",
        "wait, or `scontrol update JobId=JOBID ArrayTaskThrottle=N` raises the number",
    ),
    # What it asks for.
    Reason(
        "BadConstraints",
        "no node can ever fit it",
        "no node can ever satisfy what it asks for together (features, GPUs, cores, memory)",
        "compare the request with `sinfo -o '%P %D %c %m %G %f'`, then cancel and submit with less",
        "you",
    ),
    Reason(
        "ReqNodeNotAvail",
        "nodes down, drained or reserved",
        "nodes that it needs are down, drained, reserved or kept for maintenance",
        "wait until they are back; if the job names its nodes, submit without. Near a maintenance a shorter "
        "resources.time may still fit in before it",
    ),
    Reason(
        "PartitionTimeLimit",
        "time over the partition's limit",
        "its time limit is longer than the partition allows",
        f"`scontrol update JobId=JOBID TimeLimit=...` with a shorter one, or {_RESUBMIT}; a run that needs longer is "
        "continued by itself",
        "you",
    ),
    Reason(
        "PartitionNodeLimit",
        "nodes outside the partition's limits",
        "it asks for more (or fewer) nodes than the partition allows or has in service",
        "lower resources.nodes, choose another partition, or wait until drained nodes are back",
        "you",
    ),
    Reason(
        "PartitionConfig",
        "breaks a limit of the partition",
        "it breaks a limit of the partition",
        "`scontrol show partition` lists the limits; change the request and submit again",
        "you",
    ),
    Reason(
        "PartitionDown",
        "partition is down",
        "the partition is down: it takes jobs but starts none",
        "wait for the cluster's news, or choose another resources.partition",
    ),
    Reason(
        "PartitionInactive",
        "partition is switched off",
        "the partition is switched off",
        "choose another resources.partition, or wait for the cluster's news",
    ),
    Reason(
        "MaxMemPerLimit",
        "memory over the limit",
        "it asks for more memory per core or node than the partition allows",
        "lower resources.mem, or ask for more cores with it",
        "you",
    ),
    # Accounts and QOS.
    Reason(
        "AccountingPolicy",
        "a limit of account or QOS",
        "a limit of its account or QOS is reached",
        f"{_QOS}; {_ASSOC}",
    ),
    Reason(
        "AccountNotAllowed",
        "account not allowed here",
        "its account may not use this partition",
        f"set resources.account or resources.partition and submit again; {_ASSOC}",
        "you",
    ),
    Reason(
        "InvalidAccount",
        "account not valid",
        "its account does not exist or is not yours any more",
        f"set resources.account and submit again; {_ASSOC}",
        "you",
    ),
    Reason(
        "InvalidQOS",
        "QOS not valid",
        "its QOS does not exist or is not yours",
        f"set resources.qos and submit again; {_QOS}",
        "you",
    ),
    Reason(
        "QOSNotAllowed",
        "QOS not allowed here",
        "its account or partition does not allow this QOS",
        f"set resources.qos and submit again; {_ASSOC}",
        "you",
    ),
    Reason(
        "QOSUsageThreshold",
        "usage over the QOS threshold",
        "your usage is above what its QOS lets start (usage threshold)",
        "wait until the usage has decayed, or choose another resources.qos",
    ),
    Reason(
        "QOSJobLimit",
        "QOS: job limit",
        "its QOS has as many jobs as it may have",
        f"wait, or choose another QOS; {_QOS}",
    ),
    Reason(
        "QOSResourceLimit",
        "QOS: resource limit",
        "its QOS uses as much as it may",
        f"wait, or choose another QOS; {_QOS}",
    ),
    Reason(
        "QOSTimeLimit",
        "QOS: time used up",
        "its QOS has used up the time that it may",
        f"choose another QOS; {_QOS}",
        "you",
    ),
    Reason(
        "AssociationJobLimit", "account: job limit", "your account has as many jobs as it may have", f"wait; {_ASSOC}"
    ),
    Reason(
        "AssociationResourceLimit", "account: resource limit", "your account uses as much as it may", f"wait; {_ASSOC}"
    ),
    Reason(
        "AssociationTimeLimit",
        "account: time used up",
        "your account has used up the time that it may",
        f"another account, or more hours for this one; {_ASSOC}",
        "you",
    ),
    # Machines.
    Reason(
        "NodeDown",
        "a node is down",
        "a node that it needs is down",
        "lora-jobs resume continues; Slurm requeues it where it may",
    ),
    Reason("FrontEndDown", "no front-end node", "no front-end node is up", _SUPPORT, "admin"),
    Reason("PowerNotAvail", "no power left", "the cluster's power budget is used up", _WAIT),
    Reason("PowerReserved", "power is reserved", "the cluster's power budget is reserved for others", _WAIT),
    Reason("BlockMaxError", "nodes can't boot", "a block of nodes has too many errors to boot", _SUPPORT, "admin"),
    Reason("BlockFreeAction", "nodes being freed", "a block of nodes is being freed", _WAIT),
    Reason("BurstBufferResources", "burst buffer full", "the burst buffer has too little room now", _WAIT),
    Reason("BurstBufferStageIn", "data being staged in", "its data is being copied into the burst buffer", _WAIT),
    Reason("BurstBufferOperation", "burst buffer failed", "a burst buffer operation for it failed", _SUPPORT, "admin"),
    # Why it ended.
    Reason(
        "RaisedSignal",
        "ended by a signal",
        "its script was ended by a signal that it raised, such as a segmentation fault",
        "read lora-jobs logs, mend the cause, then lora-jobs resume",
        "you",
    ),
    Reason(
        "NonZeroExitCode",
        "ended with an error",
        "its script ended with an error",
        "read lora-jobs logs, mend the cause, then lora-jobs resume",
        "you",
    ),
    Reason(
        "TimeLimit",
        "reached its time limit",
        "it reached its time limit",
        "lora-jobs resume continues from the newest good checkpoint",
        "you",
    ),
    Reason(
        "OutOfMemory",
        "out of host memory",
        "it used more host memory than it had asked for",
        "raise resources.mem, then lora-jobs resume",
        "you",
    ),
    Reason(
        "InactiveLimit",
        "inactive too long",
        "it was inactive for longer than the cluster allows",
        "lora-jobs resume",
        "you",
    ),
    Reason(
        "JobLaunchFailure",
        "could not be started",
        "it could not be started on its nodes (file system, missing program or directory)",
        "see that the run's directory is visible on the nodes, then lora-jobs resume",
        "you",
    ),
    Reason(
        "SystemFailure",
        "the system failed",
        "Slurm, a file system or the network failed",
        "lora-jobs resume continues",
        "you",
    ),
)
_BY_CODE = {reason.code.lower(): reason for reason in REASONS}

_LIMIT = re.compile(
    r"(?P<owner>QOS|Assoc|)(?P<kind>Grp|Max|Min)"
    r"(?P<resource>BB|Billing|CPU|Energy|GRES|Jobs?|License|Memory|Mem|Node|Submit|Unknown|Wall)(?P<rest>\w*)",
    re.IGNORECASE,
)
_RESOURCES = {
    "bb": "burst buffer",
    "billing": "billing units",
    "cpu": "cores",
    "energy": "energy",
    "gres": "GPUs (GRES)",
    "license": "licenses",
    "mem": "memory",
    "memory": "memory",
    "node": "nodes",
    "unknown": "units of a resource",
}
_OWNERS = {"qos": ("QOS", "its QOS", _QOS), "assoc": ("account", "your account", _ASSOC), "": ("QOS", "its QOS", _QOS)}


class _LimitRow(Struct, frozen=True):
    """A kind of limit: a pattern over "kind resource rest", and texts with {owner} and {what} left open."""

    pattern: str
    short: str
    meaning: str
    advice: str
    turn: Actor = "wait"


# The first row that matches decides.
_LIMITS = (
    _LimitRow("min ", "{what} under a limit", "it asks for fewer {what} than {owner} wants", "ask for more", "you"),
    _LimitRow(
        "max jobs? peraccount",
        "running jobs at a limit",
        "as many jobs of your account run as {owner} allows",
        "wait for one to end",
    ),
    _LimitRow(r"\w+ jobs? ", "running jobs at a limit", "as many jobs run as {owner} allows", "wait for one to end"),
    _LimitRow(
        r"\w+ submit ",
        "queued jobs at a limit",
        "as many jobs are queued or running as {owner} allows",
        "wait for one to end, or cancel one",
    ),
    _LimitRow("grp wall ", "time used up", "the time of {owner} in all is used up", "another account or QOS", "you"),
    _LimitRow(
        "max wall ", "time over a limit", "its time limit is longer than {owner} allows", "lower resources.time", "you"
    ),
    _LimitRow(
        r"max \w+ runmins",
        "{what}: minutes in use",
        "running jobs of yours or of your account have claimed all the minutes of {what} that {owner} allows",
        "wait for one to end, or lower resources.time",
    ),
    _LimitRow(
        r"grp \w+ runminutes",
        "{what}: minutes in use",
        "the running jobs of {owner} have claimed all the minutes of {what} that they may at a time",
        "wait for one to end, or lower resources.time",
    ),
    _LimitRow(
        r"grp \w+ \w*minutes",
        "{what}: budget used up",
        "the budget of {owner} for {what} is used up",
        "another account or QOS",
        "you",
    ),
    _LimitRow(
        r"max \w+ \w*minutes",
        "{what} x time too high",
        "{what} times its time limit is more than {owner} allows for one job",
        "lower resources.time or ask for less",
        "you",
    ),
    _LimitRow(
        r"max \w+ perjob", "{what} over a limit", "it asks for more {what} than {owner} allows for one job",
        "ask for less", "you",
    ),
    _LimitRow(
        r"max \w+ pernode", "{what} over a limit", "it asks for more {what} per node than {owner} allows",
        "ask for less", "you",
    ),
    _LimitRow(
        r"max \w+ peruser",
        "{what}: your share in use",
        "you would use more {what} than {owner} allows one user at a time",
        "wait for one of your jobs to end, or ask for less",
    ),
    _LimitRow(
        "",
        "{what}: share in use",
        "the jobs of your account would use more {what} at a time than {owner} allows",
        "wait for one of them to end, or ask for less",
    ),
)  # fmt: skip

# What slurmctld writes instead of a code, as it begins. Source: slurmctld's state_desc texts, 20.11 to 25.05.
_SENTENCES = (
    ("nodes required for job are down", "ReqNodeNotAvail"),
    ("launch failed requeued held", "JobLaunchFailure"),
    ("user env retrieval failed", "JobLaunchFailure"),
    ("job requeued in held state", "JobHeldUser"),
    ("required node not available", "ReqNodeNotAvail"),
)


def explain_reason(text: str | None) -> Reason:
    """The entry of a reason as squeue prints it; one that nobody knows is shown raw, with `known` False.

    squeue may add details: "ReqNodeNotAvail, UnavailableNodes:lrdn0001", "Dependency(afterok:12)".
    """
    words = (text or "None").strip("() ")
    code = re.split(r"[,(: ]", words, maxsplit=1)[0]
    if (row := _BY_CODE.get(code.lower())) is not None:
        return row
    if (match := _LIMIT.fullmatch(code)) is not None:
        return _explain_limit(code, match)
    plain = words.replace("_", " ").lower()
    if (known := next((code for start, code in _SENTENCES if plain.startswith(start)), None)) is not None:
        return _BY_CODE[known.lower()]
    return Reason(
        words, words[:40], f"Slurm says: {words}", "`scontrol show job JOBID` may say more", "wait", known=False
    )


def _explain_limit(code: str, match: re.Match[str]) -> Reason:
    """A limit by its parts, such as QOSMaxCpuPerUserLimit or AssocGrpGRESRunMinutes."""
    label, owner, table = _OWNERS[match["owner"].lower()]
    what = _RESOURCES.get(match["resource"].lower(), "")
    parts = f"{match['kind']} {match['resource']} {match['rest']}".lower()
    row = next(row for row in _LIMITS if re.match(row.pattern, parts))
    short, meaning = (text.format(owner=owner, what=what) for text in (row.short, row.meaning))
    return Reason(code, f"{label}: {short}", meaning, f"{row.advice}; {table}", row.turn)
