"""Looking again and again: no more than one round of questions per ten seconds, and fewer while nothing changes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from lora_jobs.workflows.observing import find_status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lora_jobs.workflows.observing import RunStatus, StatusReport

SHORTEST_SECONDS = 10.0
LONGEST_SECONDS = 60.0
_GROWTH = 1.5


def next_pause(pause: float, *, changed: bool, shortest: float = SHORTEST_SECONDS) -> float:
    """Seconds until the next look: the shortest after a change, else half as long again, up to a minute."""
    shortest = max(shortest, SHORTEST_SECONDS)
    return shortest if changed else min(max(pause * _GROWTH, shortest), max(LONGEST_SECONDS, shortest))


def watch_status(
    look: Callable[[], StatusReport] = find_status,
    *,
    shortest: float = SHORTEST_SECONDS,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[StatusReport]:
    """Reports as they are read, until no run is active any more."""
    report = look()
    pause = max(shortest, SHORTEST_SECONDS)
    while True:
        yield report
        if not any(status.active for status in report.runs):
            return
        sleep(pause)
        before, report = report, look()
        changed = [_mark(status) for status in before.runs] != [_mark(status) for status in report.runs]
        pause = next_pause(pause, changed=changed, shortest=shortest)


def _mark(status: RunStatus) -> tuple[object, ...]:
    """What counts as a change: not the clock, and not the loss of a run that goes on."""
    return status.run, status.job_id, status.state, status.reason, status.rank, status.step, status.expected_start
