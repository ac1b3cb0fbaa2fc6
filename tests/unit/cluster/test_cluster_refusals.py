"""What Slurm's refusals mean, over refusals that a real Slurm gave."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_jobs.cluster.refusals import Refusal, clean_message, explain_refusal

RECORDED = Path(__file__).parents[2] / "slurm_output" / "22.05"

# File of the recorded answer -> how its message begins, and a word that its hint must have.
MEANINGS = {
    "refused_account": ("this account may not be used by you", "resources.account"),
    "refused_constraint": ("no node has this feature", "resources.constraint"),
    "refused_controller": ("Slurm's controller can't be reached", "try again"),
    "refused_cores": ("more cores than the nodes have", "cpus_per_task"),
    "refused_gpu_type": ("no node of the partition has as many GPUs", "sinfo"),
    "refused_gpus": ("no node of the partition has as many GPUs", "gpus_per_node"),
    "refused_mem": ("no node of the partition has as many GPUs, cores or as much memory", "mem"),
    "refused_munge": ("Slurm can't tell who you are", "support"),
    "refused_nodes": ("the partition has or allows fewer nodes", "resources.nodes"),
    "refused_option": ("this Slurm does not know an option", "sbatch --version"),
    "refused_partition": ("the cluster has no such partition", "resources.partition"),
    "refused_qos": ("this QOS does not exist", "resources.qos"),
    "refused_qos_time": ("the time is longer than this QOS or account allows", "resources.time"),
    "refused_reservation": ("this reservation does not exist", "resources.reservation"),
    "refused_submit_limit": ("you have as many jobs queued", "wait for one to end"),
    "refused_time": ("the time is longer than the partition allows", "resources.time"),
    "requeue_unknown": ("Slurm does not know this job any more", "lora-jobs status"),
    "sacct_down": ("Slurm's accounting database can't be reached", "own records"),
    "sprio_down": ("Slurm's controller can't be reached", "try again"),
    "squeue_down": ("Slurm's controller can't be reached", "try again"),
}


def test_every_recorded_refusal_is_explained():
    recorded = {path.stem for path in RECORDED.glob("refused_*.txt")}
    assert recorded - MEANINGS.keys() == set()


@pytest.mark.parametrize("name", MEANINGS)
def test_meaning(name: str):
    refusal = explain_refusal((RECORDED / f"{name}.txt").read_text())
    message, hint = MEANINGS[name]
    assert refusal.message.startswith(message)
    assert hint in (refusal.hint or "")
    assert " (Slurm: " in refusal.message, "Slurm's own words are kept"


def test_words_nobody_knows_are_passed_on():
    assert explain_refusal("sbatch: error: Moon phase not suitable\n") == Refusal("Moon phase not suitable", None)


def test_silence_is_said():
    assert explain_refusal("\n") == Refusal("no reason was given", None)


def test_prefixes_repetitions_and_control_characters_go():
    text = "sbatch: error: one\nsbatch: error: one\n\nallocation failure: two \x1b[31m\x07red\n"
    assert clean_message(text) == "one; two  [31m red"


def test_long_words_are_cut():
    assert len(clean_message("x" * 10_000)) == 400
