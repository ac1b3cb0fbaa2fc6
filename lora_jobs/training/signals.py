"""The wish to stop, as a flag. Nothing is done inside a handler: the ranks agree and save at a step's end."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

# SIGUSR2: our --signal before the time limit, and `scancel --signal=USR2`. SIGTERM: preemption, time limit, cancel.
STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)


class StopFlag:
    """Raised by the first of SIGUSR2, SIGTERM and `ask`; `reason` is the signal's name, None while nobody asked."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def install(self) -> None:
        """Take over both signals, also from submitit (which ignores SIGTERM). Main thread only."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    @property
    def raised(self) -> bool:
        return self.reason is not None

    def ask(self, reason: str) -> None:
        """Raise the flag without a signal."""
        if self.reason is None:
            self.reason = reason

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.ask(signal.Signals(number).name)
