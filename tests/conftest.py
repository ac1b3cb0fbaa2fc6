"""For all tests: Ctrl-C where a shell ignores it, and which tests share a worker of `make test`."""

from __future__ import annotations

import signal

import pytest


def pytest_configure() -> None:
    """A runner that a shell started in the background ignores Ctrl-C, and so would all that it starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file stays on one worker, as its fixtures do; the tests on the real Slurm share a cluster and so a worker."""
    for item in items:
        on_slurm = item.get_closest_marker("slurm") is not None
        item.add_marker(pytest.mark.xdist_group("slurm" if on_slurm else item.path.stem))
