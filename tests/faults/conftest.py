"""Fixtures of the fault tests. LORA_JOBS_FAULTS=long runs every case; `make faults` sets it and collects the rows.

LORA_JOBS_FAULTS_PART=1/4 runs a quarter of what was collected, the tests number 1, 5, 9, ...
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))

from fault_ranks import Stopped, make_stopped
from interruptions import finish
from tiny_runs import RankServer, create_tiny_run, make_tiny_files, serve_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path(__file__).parent


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    index, count = (int(word) for word in os.environ.get("LORA_JOBS_FAULTS_PART", "0/1").split("/"))
    items[:] = items[index::count]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankServer]:
    with serve_ranks(HERE / "fault_server.py", tmp_path_factory.mktemp("ranks")) as server:
        yield server


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with models/tiny_gemma2 and data/tiny."""
    return make_tiny_files(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def stopped(server: RankServer, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Stopped]:
    """Stopped runs by kind, each made once."""
    root = tmp_path_factory.mktemp("stopped")
    made: dict[str, Stopped] = {}

    def get(kind: str) -> Stopped:
        if kind not in made:
            made[kind] = make_stopped(server, kind, root / kind, tiny)
        return made[kind]

    return get


@pytest.fixture(scope="session")
def uninterrupted(server: RankServer, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The adapter's hash of a run of these sections that nothing interrupts; each is trained once."""
    root = tmp_path_factory.mktemp("uninterrupted")
    made: dict[str, str] = {}

    def get(sections: dict[str, Any], ranks: int) -> str:
        key = json.dumps([sections, ranks], sort_keys=True)
        if key not in made:
            made[key] = finish(server, create_tiny_run(root, f"whole-{len(made) + 1}", tiny, **sections), ranks)
        return made[key]

    return get


@pytest.fixture
def record() -> Callable[..., None]:
    """Adds a row to the table: record("group", "case", stock="crashed", ours="fell back", ...)."""

    def write(group: str, case: str, **values: Any) -> None:
        path = os.environ.get("LORA_JOBS_FAULTS_ROWS")
        if path is not None:
            with Path(path).open("a") as file:
                file.write(json.dumps({"group": group, "case": case, **values}) + "\n")

    return write
