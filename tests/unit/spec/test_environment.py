"""Cluster files: where they are looked for, what is refused in them, and what a job may ask of a partition."""

# ruff: noqa: E501  (tables: one case a line)
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from lora_jobs.errors import Problem, SpecError
from lora_jobs.spec import (
    ClusterEnvironment,
    ResourceSpec,
    find_resource_problems,
    find_submission_problems,
    find_unused_resources,
    list_environments,
    load_environment,
    parse_environment,
)

if TYPE_CHECKING:
    from pathlib import Path

CLUSTER = """\
scheduler: slurm
account_required: true
default_partition: gpu
partitions:
  gpu:
    gpu: A100-64
    gpus_per_node: 4
    cpus_per_node: 32
    mem_per_node: 494000M
    max_time: "24:00:00"
    max_nodes: 64
    qos: {debug: {max_time: "00:30:00", max_nodes: 2}, long: {max_time: 4-00:00:00}}
  cpu: {}
"""


def parse(text: str = CLUSTER, name: str = "big") -> ClusterEnvironment:
    return parse_environment(text, name=name, file=f"envs/{name}.yaml")


def find_problems(text: str) -> list[tuple[int | None, str, str]]:
    with pytest.raises(SpecError) as caught:
        parse(text)
    return [(problem.line, problem.path, problem.message) for problem in caught.value.problems]


def ask(**resources: Any) -> list[tuple[str, str]]:
    found = find_resource_problems(ResourceSpec(cluster="big", **resources), parse())
    return [(problem.path, problem.message) for problem in found]


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two directories of environments: `named`, which $LORA_JOBS_ENVS names, and envs/ of the current directory."""
    for name, files in {"named": ["a", "b"], "envs": ["b", "c", "local"]}.items():
        (tmp_path / name).mkdir()
        for file in files:
            text = f"scheduler: local\ndescription: {file} of {name}\n"
            (tmp_path / name / f"{file}.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_JOBS_ENVS", str(tmp_path / "named"))
    return tmp_path


def test_a_cluster_and_its_partitions() -> None:
    environment = parse()
    assert (environment.name, environment.file, environment.scheduler) == ("big", "envs/big.yaml", "slurm")
    assert environment.gpu_option == "gpus-per-node"
    assert environment.find_partition(None) == environment.partitions["gpu"]
    assert environment.find_partition("cpu") == environment.partitions["cpu"]
    assert environment.find_partition("none") is None
    assert environment.to_values()["partitions"]["gpu"]["qos"]["long"] == {"max_time": "4-00:00:00", "max_nodes": None}


def test_named_environments_are_looked_for_in_order(places: Path) -> None:
    seen = {name: load_environment(name).description for name in ["a", "b", "c"]}
    assert seen == {"a": "a of named", "b": "b of named", "c": "c of envs"}
    assert load_environment("leonardo").default_partition == "boost_usr_prod"
    assert [environment.name for environment in list_environments()[0]] == ["a", "b", "c", "leonardo", "local"]
    assert load_environment("local").description == "local of envs"


def test_a_path_is_no_name(places: Path) -> None:
    assert load_environment("envs/b.yaml").description == "b of envs"
    assert load_environment(str(places / "envs" / "b.yaml")).description == "b of envs"
    with pytest.raises(SpecError, match=r"b\.yaml: no such file"):
        load_environment("b.yaml")
    with pytest.raises(SpecError, match=r"\.\./x: no such file"):
        load_environment("../x")


def test_an_unknown_name_lists_the_known_ones(places: Path) -> None:
    with pytest.raises(SpecError) as caught:
        load_environment("leonrado")
    message = "unknown cluster 'leonrado'; did you mean leonardo? (known: a, b, c, local, leonardo)"
    assert caught.value.problems == (Problem("resources.cluster", message),)
    assert caught.value.hint is not None


def test_a_wrong_file_hides_no_other(places: Path) -> None:
    (places / "envs" / "c.yaml").write_text("scheduler: pbs\n")
    found, errors = list_environments()
    assert [environment.name for environment in found] == ["a", "b", "leonardo", "local"]
    assert [error.message for error in errors] == ["envs/c.yaml: 1 problem"]


def test_a_variable_that_names_no_directory_is_an_error(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_JOBS_ENVS", str(places / "nowhere"))
    with pytest.raises(SpecError, match=r"LORA_JOBS_ENVS names no directory: .*nowhere"):
        load_environment("a")


def test_a_path_that_is_not_there_names_the_known_ones(places: Path) -> None:
    with pytest.raises(SpecError, match=r"envs/leonrado\.yaml: no such file") as caught:
        load_environment("envs/leonrado.yaml")
    assert "(known: a, b, c, local, leonardo)" in (caught.value.hint or "")
    assert caught.value.problems[0].path == "resources.cluster"


def test_what_only_slurm_gives_is_not_silently_left_aside() -> None:
    here = parse("scheduler: local\n", "desk")
    resources = ResourceSpec(cluster="desk", partition="boost", qos="long")
    assert find_unused_resources(resources, here) == [
        "resources.partition is not used: desk is this machine, not Slurm",
        "resources.qos is not used: desk is this machine, not Slurm",
    ]
    assert find_unused_resources(ResourceSpec(cluster="big", partition="gpu"), parse()) == []


def test_everything_wrong_in_a_file_is_said_at_once() -> None:
    text = """\
scheduler: slum
default_partition: gpu
partitons: {}
partitions:
  "g p": {}
  cpu: {gpus_per_nodes: 4, mem_per_node: much}
environment:
  HF_TOKEN: x
  1X: y
  SLURM_JOB_ID: "3"
  OMP: 1
name: other
file: x
"""
    assert find_problems(text) == [
        (1, "scheduler", "wanted one of slurm, local, got 'slum'; did you mean slurm?"),
        (2, "default_partition", "is none of the partitions below: cpu"),
        (3, "partitons", "unknown key; did you mean partitions?"),
        (5, "partitions.g p", "'g p' is not allowed here: wanted one word of letters, digits and . _ : + @ -, without spaces or slashes"),
        (6, "partitions.cpu.mem_per_node", "'much' is not allowed here: wanted a number with K, M, G or T, such as 64G"),
        (6, "partitions.cpu.gpus_per_nodes", "unknown key; did you mean gpus_per_node?"),
        (8, "environment.HF_TOKEN", "looks like a secret: scripts are stored with every run; export it in your shell, sbatch passes it on"),
        (9, "environment.1X", "'1X' is not allowed here: wanted a variable name: letters, digits and underscores, not starting with a digit"),
        (10, "environment.SLURM_JOB_ID", "is set by Slurm or by lora-jobs itself: take it out"),
        (11, "environment.OMP", 'wanted text, got 1: put it in quotes, "1"'),
        (12, "name", "must be the file's own name, big"),
        (13, "file", "is set when the file is loaded: take it out"),
    ]  # fmt: skip


def test_the_default_partition_is_one_of_them() -> None:
    assert find_problems("scheduler: slurm\ndefault_partition: gpu\npartitions: {cpu: {}, big: {}}\n") == [
        (2, "default_partition", "is none of the partitions below: cpu, big")
    ]


@pytest.mark.parametrize(
    "line",
    [
        "HF_TOKEN: x",
        "WANDB_API_KEY: x",
        "MY_SECRET: x",
        "DB_PASSWORD: x",
        "APIKEY: x",
        "hf_token: x",
        "AWS_CREDENTIALS: x",
        "X: hf_abcdefghijklmnopqrstuvwx",
        "http_proxy: http://me:hunter2@proxy:3128",
        "RANK: '0'",
        "SBATCH_ACCOUNT: x",
        "LORA_JOBS_RUN: x",
    ],
)
def test_secrets_and_reserved_names_are_refused(line: str) -> None:
    ((number, path, message),) = find_problems(f"scheduler: local\nenvironment:\n  {line}\n")
    assert (number, path) == (3, f"environment.{line.partition(':')[0]}")
    assert "secret" in message or "is set by Slurm" in message
    assert "hunter2" not in message


@pytest.mark.parametrize("value", ["a\\nb", "a\\x1b[0m", "a\\u0000", "a\\u2028b"])
def test_control_characters_in_values_are_refused(value: str) -> None:
    text = f'scheduler: local\nenvironment:\n  X: "{value}"\nmodules: ["{value}"]\npython: "{value}"\n'
    assert [path for _, path, _ in find_problems(text)] == ["environment.X", "modules.0", "python"]


def test_harmless_variables_are_kept() -> None:
    variables = {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "EMPTY": "",
        "X": "$(id) 'quoted' http://proxy",
    }
    lines = "".join(f"  {name}: {value!r}\n" for name, value in variables.items() if name != "X")
    text = f"scheduler: local\nenvironment:\n{lines}  X: $(id) 'quoted' http://proxy\n"
    assert parse(text).environment == variables


def test_what_fits_has_no_problems() -> None:
    assert ask() == []
    assert ask(partition="gpu", gpus_per_node=4, cpus_per_task=8, mem="494000M", time="24:00:00", nodes=64) == []
    assert ask(partition="cpu", gpus_per_node=99, nodes=9999, time="99-00:00:00", mem="9T") == []


def test_everything_above_a_partition_is_said() -> None:
    assert ask(gpus_per_node=5, cpus_per_task=8, mem="483G", time="24:00:01", nodes=65) == [
        ("resources.gpus_per_node", "5 asked, a node of gpu has 4"),
        ("resources.cpus_per_task", "8 for each of 5 tasks are 40, a node of gpu has 32"),
        ("resources.mem", "483G asked, a node of gpu has 494000M"),
        ("resources.time", "24:00:01 asked, gpu allows 24:00:00"),
        ("resources.nodes", "65 asked, gpu allows 64"),
    ]


def test_the_limits_of_a_qos_take_the_place_of_the_partition_s() -> None:
    assert ask(qos="debug", time="00:30:01", nodes=3) == [
        ("resources.time", "00:30:01 asked, qos debug allows 00:30:00"),
        ("resources.nodes", "3 asked, qos debug allows 2"),
    ]
    assert ask(qos="long", time="4-00:00:00", nodes=65) == [("resources.nodes", "65 asked, gpu allows 64")]
    assert ask(qos="unlisted", time="24:00:00") == []


def test_an_unknown_partition_is_named_with_its_neighbours() -> None:
    assert ask(partition="gpus") == [
        ("resources.partition", "unknown partition 'gpus'; did you mean gpu? (big has gpu, cpu)")
    ]


def test_a_cluster_without_a_default_partition_wants_one() -> None:
    environment = parse("scheduler: slurm\npartitions: {a: {}, b: {}}\n")
    assert find_resource_problems(ResourceSpec(), environment) == [
        Problem("resources.partition", "is missing: big has a, b")
    ]


def test_one_machine_is_one_node() -> None:
    local = parse("scheduler: local\n", name="here")
    assert find_resource_problems(ResourceSpec(partition="x", gpus_per_node=99), local) == []
    assert [problem.path for problem in find_resource_problems(ResourceSpec(nodes=2), local)] == ["resources.nodes"]
    assert find_submission_problems(ResourceSpec(gpu="H100-80"), local) == []


def test_what_only_a_submission_minds() -> None:
    assert find_submission_problems(ResourceSpec(account="me", gpu="A100-64"), parse()) == []
    assert find_submission_problems(ResourceSpec(gpu="H100-80"), parse()) == [
        Problem("resources.account", "is missing: big accounts every job; set resources.account to your project"),
        Problem("resources.gpu", "is H100-80, but partition gpu has A100-64"),
    ]
