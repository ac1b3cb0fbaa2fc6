"""How a plan's times read."""

from __future__ import annotations

from datetime import datetime

import pytest

from lora_jobs.cli.show_plan import format_clock, format_moment, format_span, shorten_names

NOW = datetime(2026, 11, 20, 21, 30)  # a Friday


@pytest.mark.parametrize(
    ("moment", "shown"),
    [
        ("2026-11-20T21:30:40", "now"),
        ("2026-11-20T21:00:00", "now"),
        ("2026-11-20T21:55:00", "21:55 (in 25 min)"),
        ("2026-11-21T02:30:00", "Sat 02:30 (in 5.0 h)"),
        ("2026-12-24T09:30:00", "2026-12-24 09:30 (in 33.5 d)"),
    ],
)
def test_when_something_starts(moment: str, shown: str):
    assert format_moment(moment, NOW) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 s"), (59, "59 s"), (60, "1 min"), (3599, "60 min"), (90000, "25.0 h"), (172800, "2.0 d")],
)
def test_how_long(seconds: float, shown: str):
    assert format_span(seconds) == shown


def test_unknown_moments_and_many_names():
    assert format_clock(None, NOW) == "unknown"
    assert shorten_names(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
