"""`fetch` from a server that speaks the hub's protocol, `data`, and a run on what was fetched, without a network."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from hub_server import COMMIT, serve_hub

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]

SPEC = """
name: hubbed
model: {name_or_path: org/tiny, dtype: float32}
lora: {r: 4}
data: {dataset: org/drawings, train: train, eval: validation, format: svg_caption, max_length: 256}
training: {max_steps: 2, save_steps: 2, activation_checkpointing: false}
"""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


@pytest.fixture(scope="module")
def repositories(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model with weights in two formats, and a dataset with two splits in Parquet."""
    import pyarrow.json
    import pyarrow.parquet

    root = tmp_path_factory.mktemp("repositories")
    model = root / "tiny"
    shutil.copytree(tiny / "models" / "tiny_gemma2", model)
    (model / "pytorch_model.bin").write_bytes(b"weights in a pickle")
    drawings = root / "drawings"
    (drawings / "data").mkdir(parents=True)
    for split, name in (("train", "train"), ("validation", "eval")):
        table = pyarrow.json.read_json(tiny / "data" / "tiny" / f"{name}.jsonl")
        pyarrow.parquet.write_table(table, drawings / "data" / f"{split}-00000-of-00001.parquet")
    return {"models/org/tiny": model, "datasets/org/drawings": drawings}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "job.yaml").write_text(SPEC)
    return tmp_path


def run(directory: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment = {
        **kept,
        "LORA_JOBS_HOME": str(directory / "runs"),
        "HF_HOME": str(directory / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        **variables,
    }
    command = [sys.executable, "-W", "ignore", "-m", "lora_jobs", *arguments]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def nowhere() -> Iterator[str]:
    """The address of a port where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_what_is_fetched_trains_offline(here: Path, repositories: dict[str, Path], nowhere: str) -> None:
    with serve_hub(repositories) as (address, log):
        # The switches that keep compute nodes from asking the hub do not hinder fetch.
        done = run(here, "fetch", "job.yaml", "--json", HF_ENDPOINT=address, **OFFLINE)
        assert done.returncode == 0, done.stderr
        model, dataset = json.loads(done.stdout)["fetched"]
        assert (model["kind"], model["repository"], model["commit"]) == ("model", "org/tiny", COMMIT)
        assert (dataset["kind"], dataset["repository"], dataset["commit"]) == ("dataset", "org/drawings", COMMIT)
        assert model["directory"] == str(here / "cache/hub/models--org--tiny/snapshots" / COMMIT)
        assert not any("pytorch_model.bin" in line for line in log)
        asked = len(log)
        again = run(here, "fetch", "job.yaml", HF_ENDPOINT=address)
        assert again.returncode == 0
        assert not any(line.startswith("GET") and "/resolve/" in line for line in log[asked:])
        assert f"model.revision: {COMMIT}" in again.stdout

    offline = {"HF_ENDPOINT": nowhere, **OFFLINE}
    shown = json.loads(run(here, "data", "job.yaml", "--json", **offline).stdout)
    assert shown["train"]["rows"] > 0
    assert shown["eval"]["rows"] > 0
    trained = run(here, "submit", "job.yaml", "--cluster", "local", "--wait", **offline)
    assert trained.returncode == 0, trained.stderr + trained.stdout
    assert (here / "runs" / "hubbed-1" / "adapter" / "MANIFEST.json").exists()


REFUSED = {
    "repository": ({"model.name_or_path": "org/tyni"}, 2, "the hub knows no model org/tyni, or it is private"),
    "revision": ({"model.revision": "v7"}, 2, "has no revision 'v7'"),
    "gated": ({"model.name_or_path": "org/gated"}, 2, "is gated, and this account may not read it"),
    "dataset": ({"data.dataset": "org/paintings"}, 2, "the hub knows no dataset org/paintings"),
    "pickles": ({"model.name_or_path": "org/pickles"}, 2, "has no safetensors files"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_hub_refuses_is_said_in_words(case: str, here: Path, repositories: dict[str, Path]) -> None:
    changes, code, words = REFUSED[case]
    pickles = here / "pickles"
    pickles.mkdir()
    (pickles / "config.json").write_text("{}")
    (pickles / "pytorch_model.bin").write_bytes(b"weights")
    more = {"models/org/gated": repositories["models/org/tiny"], "models/org/pickles": pickles}
    with serve_hub({**repositories, **more}, gated=("models/org/gated",)) as (address, _):
        settings = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
        done = run(here, "fetch", "job.yaml", *settings, HF_ENDPOINT=address)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_network_fetch_says_where_to_run_it(here: Path, nowhere: str) -> None:
    done = run(here, "fetch", "job.yaml", HF_ENDPOINT=nowhere)
    assert done.returncode == 4, done.stderr
    assert "run this on a login node" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_offline_cluster_is_told_before_the_queue(here: Path) -> None:
    (here / "offline.yaml").write_text(
        "scheduler: slurm\ndefault_partition: main\npartitions: {main: {gpu: A100-64}}\n"
        'environment: {HF_HUB_OFFLINE: "1"}\n'
    )
    settings = ["--set", "resources.cluster=offline.yaml", "--set", "model.name_or_path=google/gemma-2-2b-it"]
    done = run(here, "check", "job.yaml", *settings)
    assert done.returncode == 0, done.stderr
    assert "google/gemma-2-2b-it is not in" in done.stdout
    assert "org/drawings is not in" in done.stdout
    snapshot = here / "cache/hub/models--google--gemma-2-2b-it/snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (here / "cache/hub/models--google--gemma-2-2b-it/refs").mkdir()
    (here / "cache/hub/models--google--gemma-2-2b-it/refs/main").write_text(COMMIT)
    assert "google/gemma-2-2b-it is not in" not in run(here, "check", "job.yaml", *settings).stdout


def check_lengths(here: Path, *settings: str) -> tuple[str, list[str]]:
    """What `check` says of the lengths of the rows."""
    said = json.loads(run(here, "check", "job.yaml", "--json", *settings).stdout)
    return said["time"]["row_lengths"], [text for text in said["warnings"] if "data.max_length" in text]


def test_data_shows_what_is_masked_and_how_long_the_rows_are(tiny: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a b c", "completion": " d"}, {"prompt": "a", "completion": " b c d e f g h i j k l m"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 5))
    (tmp_path / "job.yaml").write_text(
        f"name: shown\nmodel: {{name_or_path: {tiny / 'models' / 'tiny_gemma2'}}}\nlora: {{r: 4}}\n"
        "data: {train: rows.jsonl, max_length: 12}\ntraining: {max_steps: 1}\n"
    )
    shown = json.loads(run(tmp_path, "data", "job.yaml", "--json", "--examples", "1", "--rows", "8").stdout)["train"]
    (example,) = shown["examples"]
    assert [piece["learned"] for piece in example] == [False, True]
    assert example[1]["text"] == " d<eos>"
    assert (shown["rows"], shown["more"], shown["too_long"]) == (8, True, 4)
    assert sum(each["rows"] for each in shown["histogram"]) == 8
    assert shown["learned_tokens"] < shown["tokens"]
    assert check_lengths(tmp_path) == ("partly counted", [])
    page = run(tmp_path, "data", "job.yaml").stdout
    assert "5 rows are longer than data.max_length 12: they are left out" in page
    left_out = "data.train: 5 of 10 rows are longer than data.max_length 12: left out"
    assert check_lengths(tmp_path) == ("counted", [left_out])
    longest = json.loads(run(tmp_path, "data", "job.yaml", "--json").stdout)["train"]["longest"]
    enough = math.ceil(longest / 8) * 8
    assert check_lengths(tmp_path, "--set", "data.max_length=64") == (
        "counted",
        [f"no row is longer than {enough} tokens: --set data.max_length={enough} would need less memory"],
    )


def test_data_refuses_a_broken_file_and_an_unknown_split(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    model = tiny / "models" / "tiny_gemma2"
    text = f"name: shown\nmodel: {{name_or_path: {model}}}\nlora: {{r: 4}}\ntraining: {{max_steps: 1}}\n"
    (tmp_path / "job.yaml").write_text(text + "data: {train: rows.jsonl}\n")
    done = run(tmp_path, "data", "job.yaml")
    assert (done.returncode, "rows.jsonl line 2: not JSON" in done.stderr) == (2, True), done.stderr
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "job.yaml").write_text(text + "data: {dataset: folder, train: tset}\n")
    done = run(tmp_path, "data", "job.yaml")
    assert (done.returncode, "split 'tset'" in done.stderr) == (2, True), done.stderr
