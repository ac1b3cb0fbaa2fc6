"""What Slurm's refusals mean, and what to do about them."""

from __future__ import annotations

import re

from msgspec import Struct


class Refusal(Struct, frozen=True):
    """A refusal in plain words, with Slurm's own, and the next thing to try."""

    message: str
    hint: str | None


class _Row(Struct, frozen=True):
    pattern: str
    message: str
    hint: str


_CONTROLLER_HINT = "it may be down or restarting: try again in a few minutes, or ask the cluster's support"

# The first row that matches decides, so the particular stand before the general. Slurm's words: slurm_errno.c
# (22.05 to 25.05) and the names of the wait reasons, which sbatch prints where a limit denies the job at once.
_ROWS = (
    _Row(
        r"QOSMaxWall|AssocMaxWall|AssocGrpWall|QOSGrpWall",
        "the time is longer than this QOS or account allows",
        "lower resources.time; `sacctmgr show qos format=name,maxwall` lists the limits",
    ),
    _Row(
        r"(QOS|Assoc)\w*Max\w*Submit\w*|(QOS|Assoc)(Grp|Max)Jobs\w*|Job array index",
        "you have as many jobs queued as this QOS or account allows",
        "wait for one to end, cancel one, or choose another resources.qos",
    ),
    _Row(
        r"(QOS|Assoc)\w*(Node|Cpu|CPU|GRES|Gres|Mem|TRES|Billing)\w*",
        "more nodes, GPUs, cores or memory than this QOS or account allows for one job or one user",
        "lower resources.nodes or gpus_per_node, or choose another resources.qos; "
        "`sacctmgr show qos format=name,maxtres,maxtrespu` lists the limits",
    ),
    _Row(
        r"Invalid account or account/partition",
        "this account may not be used by you, or not in this partition",
        "set resources.account; `sacctmgr show assoc user=$USER format=account,partition,qos` lists yours",
    ),
    _Row(
        r"invalid partition specified|Invalid partition name",
        "the cluster has no such partition",
        "set resources.partition; `sinfo -o %P` lists the partitions",
    ),
    _Row(
        r"Invalid qos|Job's QOS not permitted",
        "this QOS does not exist, or you or this partition may not use it",
        "set resources.qos; `sacctmgr show assoc user=$USER format=account,qos` lists yours",
    ),
    _Row(
        r"time limit is invalid|Invalid --time",
        "the time is longer than the partition allows",
        "lower resources.time; `sinfo -o '%P %l'` lists the limits. A run that needs longer is continued by itself",
    ),
    _Row(
        r"Node count specification invalid|Invalid node count|Requested node count",
        "the partition has or allows fewer nodes",
        "lower resources.nodes; `sinfo -o '%P %D'` lists the nodes",
    ),
    _Row(
        r"More processors requested|CPU count|Unable to satisfy cpu",
        "more cores than the nodes have",
        "lower resources.cpus_per_task or gpus_per_node; `sinfo -N -o '%N %c'` lists the cores",
    ),
    _Row(
        r"Memory (specification|required)|memory specification|Invalid --mem",
        "more memory than the nodes have",
        "lower resources.mem; `sinfo -o '%P %m'` lists the memory of the nodes in MB",
    ),
    _Row(
        r"Invalid (generic resource|gres|Trackable)|Invalid GRES|gres\) specification",
        "the nodes have no such GPU",
        "`sinfo -o '%P %G'` lists the GPUs; check resources.gpu and gpu_option of the environment file",
    ),
    _Row(
        r"Invalid feature|Invalid constraint",
        "no node has this feature",
        "set resources.constraint to one that `sinfo -o '%P %f'` lists",
    ),
    _Row(
        r"[Rr]eservation",
        "this reservation does not exist, or does not cover the job",
        "set resources.reservation; `scontrol show reservation` lists them",
    ),
    _Row(
        r"Requested node configuration is not available|Requested partition configuration not available",
        "no node of the partition has as many GPUs, cores or as much memory as one node of the job asks for",
        "compare gpus_per_node, cpus_per_task and mem with `sinfo -o '%P %D %c %m %G'`",
    ),
    _Row(
        r"group not permitted|Access/permission denied|not permitted to use",
        "you may not use this partition",
        "choose another resources.partition, or ask the cluster's support for access",
    ),
    _Row(
        r"accounting/QOS policy",
        "a limit of this account or QOS is reached",
        "`sacctmgr show qos` and `sacctmgr show assoc user=$USER` list the limits",
    ),
    _Row(
        r"Problem talking to the database|PersistInit|slurmdbd|Slurm accounting storage is disabled",
        "Slurm's accounting database can't be reached",
        "jobs that ended long ago can't be looked up for now; the runs' own records are still there",
    ),
    _Row(
        r"Unable to contact slurm controller|Unable to establish|Connection (refused|timed out)|"
        r"configuration (file|source)",
        "Slurm's controller can't be reached",
        _CONTROLLER_HINT,
    ),
    _Row(
        r"Socket timed out|temporarily unable|Zero Bytes were transmitted|Resource temporarily unavailable",
        "Slurm's controller is too busy to answer",
        _CONTROLLER_HINT,
    ),
    _Row(
        r"authentication|Munge|munge",
        "Slurm can't tell who you are: munge does not work on this machine",
        "ask the cluster's support",
    ),
    _Row(
        r"unrecognized option|Invalid directive|invalid option",
        "this Slurm does not know an option of the script",
        "`sbatch --version` says how old it is; see the #SBATCH lines of script.sbatch",
    ),
    _Row(
        r"Invalid job id|job not found|does not exist",
        "Slurm does not know this job any more",
        "it ended some time ago; `lora-jobs status` knows what became of the run",
    ),
    _Row(
        r"already (completing|finished|completed)|Job/step already",
        "the job has ended already",
        "`lora-jobs status` says how",
    ),
)
# Lines that only repeat what is underneath, in front of the words that say it.
_PREFIX = re.compile(
    r"^(sbatch: |scancel: |scontrol: |squeue: |sacct: |sprio: )?(error: |fatal: )*"
    r"(allocation failure: |Batch job submission failed: )?"
)


def clean_message(text: str) -> str:
    """A program's words on one line, without its prefixes and repetitions; at most 400 characters."""
    lines = dict.fromkeys(_PREFIX.sub("", line.strip()) for line in text.splitlines())
    words = "; ".join(line for line in lines if line)
    printable = "".join(letter if letter.isprintable() else " " for letter in words)
    return printable if len(printable) <= 400 else printable[:397] + "..."


def explain_refusal(text: str) -> Refusal:
    """Plain words and a hint for what a Slurm command wrote; unknown words are passed on as they are."""
    words = clean_message(text)
    for row in _ROWS:
        if re.search(row.pattern, words) is not None:
            return Refusal(f"{row.message} (Slurm: {words})", row.hint)
    return Refusal(words or "no reason was given", None)
