from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from lora_jobs.training.signals import STOP_SIGNALS, StopFlag

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_raises_the_flag_and_nothing_else(number: signal.Signals) -> None:
    stop = StopFlag()
    stop.install()
    assert (stop.raised, stop.reason) == (False, None)
    signal.raise_signal(number)
    assert (stop.raised, stop.reason) == (True, number.name)


def test_the_first_signal_is_the_reason() -> None:
    stop = StopFlag()
    stop.install()
    signal.raise_signal(signal.SIGUSR2)
    signal.raise_signal(signal.SIGTERM)
    assert stop.reason == "SIGUSR2"
