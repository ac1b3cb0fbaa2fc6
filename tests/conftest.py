"""For all tests: Ctrl-C where a shell ignores it, and which tests share a worker of `make test`."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

from xdist.scheduler import LoadFileScheduling

if TYPE_CHECKING:
    import pytest


def pytest_configure() -> None:
    """A runner that a shell started in the background ignores Ctrl-C, and so would all that it starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class ByFileAndCluster(LoadFileScheduling):
    """A file stays on one worker, as its fixtures do; the tests on the real Slurm share a cluster and so a worker."""

    def _split_scope(self, nodeid: str) -> str:
        return "tests/cluster" if nodeid.startswith("tests/cluster/") else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFileAndCluster:
    return ByFileAndCluster(config, log)
