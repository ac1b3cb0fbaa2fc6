"""Fixtures of the training tests: a tiny model with its data, runs to train, and ranks to train them with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tiny_runs import HERE, RankServer, create_tiny_run, make_tiny_files, serve_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from lora_jobs.runs import Run


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankServer]:
    with serve_ranks(HERE / "rank_server.py", tmp_path_factory.mktemp("ranks")) as server:
        yield server


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with models/tiny_gemma2 and data/tiny."""
    return make_tiny_files(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def make_run(tmp_path: Path, tiny: Path) -> Callable[..., Run]:
    """Creates runs of this test: make_run("name-1", training={...}, deepspeed={...})."""

    def make(run_id: str, **sections: dict[str, Any] | None) -> Run:
        return create_tiny_run(tmp_path, run_id, tiny, **sections)

    return make
