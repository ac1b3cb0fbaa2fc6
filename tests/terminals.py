"""A pseudo-terminal's other end, for tests of what a program prints on a terminal."""

from __future__ import annotations

import os


def read_until_closed(terminal: int) -> bytes:
    """All that is still written there, until its last program has ended; then it is closed."""
    shown = b""
    while True:
        try:
            more = os.read(terminal, 65536)
        except OSError:  # Linux says so of a terminal that nobody has open any more
            break
        if not more:
            break
        shown += more
    os.close(terminal)
    return shown
