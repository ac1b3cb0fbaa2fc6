"""envs/NAME.yaml from what Slurm says: it loads, holds what was recorded, and says what a person has to look at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lora_jobs.cluster.inventory import Inventory, parse_sinfo
from lora_jobs.errors import ClusterError, SpecError
from lora_jobs.spec import load_environment, parse_environment
from lora_jobs.workflows.describing import choose_gpu, init_cluster, render_environment

if TYPE_CHECKING:
    from conftest import FakeCluster


def test_the_recorded_cluster(cluster: FakeCluster):
    cluster.answer_as_recorded()
    path, _, remarks = init_cluster("mine")
    assert path == Path("envs/mine.yaml")
    found = load_environment("mine")
    assert (found.scheduler, found.account_required, found.default_partition) == ("slurm", True, "boost_usr_prod")
    debug = {"boost_qos_dbg": ("00:30:00", 2)}
    seen = {
        name: (p.gpu, p.gpus_per_node, p.cpus_per_node, p.mem_per_node, p.max_time, p.max_nodes,
               {qos: (limits.max_time, limits.max_nodes) for qos, limits in p.qos.items()})
        for name, p in found.partitions.items()
    }  # fmt: skip
    assert seen == {
        "boost_usr_prod": ("A100-40", 4, 32, "494000M", "1-00:00:00", 2, debug),
        "boost_urgent": ("A100-40", 4, 32, "494000M", "01:00:00", 2, debug),
        "lrd_all_serial": (None, None, 32, "64000M", "04:00:00", 1, debug),
    }
    assert len(remarks) == 2
    assert "the smallest is assumed" in remarks[0]
    text = path.read_text()
    with pytest.raises(SpecError, match="exists already"):
        init_cluster("mine")
    assert path.read_text() == text
    for bad in ("../x", "a b", ""):
        with pytest.raises(SpecError):
            init_cluster(bad)
    assert [file.name for file in Path("envs").iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    ("word", "features", "name", "remark"),
    [
        ("a100", [], "A100-40", "smallest is assumed"),
        ("a100", ["ib", "a100_80"], "A100-80", None),
        ("A100", ["gpu64g"], "A100-64", None),
        ("h200", [], "H200", None),
        ("h100", [], "H100-80", None),
        ("rtx4090", [], "RTX4090", None),
        ("nvidia_geforce_rtx_3090", [], "RTX3090", None),
        (None, ["ib", "l40s"], "L40S", "from the feature l40s"),
        ("mi250", [], None, "Slurm says 'mi250'"),
        (None, [], None, "Slurm names no type"),
    ],
)
def test_slurms_word_for_a_gpu(word: str | None, features: list[str], name: str | None, remark: str | None):
    gpu, said = choose_gpu(word, features)
    assert (gpu.name if gpu else None) == name
    assert remark is None if said is None else remark is not None and remark in said


def test_odd_clusters_still_load():
    """Unlike nodes, names that are no words, unknown GPUs, no limits, no scontrol."""
    text = (
        "mix|up|infinite|2|64|500000|idle|gpu:mi250:8|(null)\nmix|up|infinite|1|32+|256000|mixed|gpu:v100:4|x\n"
        "no gpu|up|1:00|1|1|1|idle|(null)|(null)\nempty|inact|n/a|0|0|0|n/a|(null)|(null)\n"
    )
    inventory = Inventory(
        version=None, config={"ClusterName": 'a"b', "SelectType": "select/linear"}, groups=tuple(parse_sinfo(text))
    )
    written, remarks = render_environment("odd", inventory)
    found = parse_environment(written, name="odd", file="envs/odd.yaml")
    mix = found.partitions["mix"]
    assert (mix.gpu, mix.gpus_per_node, mix.max_time, mix.max_nodes) == (None, 8, None, 3)
    assert (found.gpu_option, found.account_required, list(found.partitions)) == ("gres", False, ["mix", "empty"])
    assert any("mi250" in remark for remark in remarks)
    assert any("4 x v100" in remark for remark in remarks)


def test_no_cluster_is_an_error_that_says_so(cluster: FakeCluster):
    with pytest.raises(ClusterError, match="scontrol is not on PATH"):
        init_cluster("mine")
    assert not Path("envs").exists()
