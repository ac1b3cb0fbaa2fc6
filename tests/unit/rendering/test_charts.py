"""Curves as geometry: ticks, breaks, thinning; and what is drawn of odd values."""

from __future__ import annotations

import math

import pytest

from lora_jobs.rendering.charts import (
    Series,
    average_points,
    build_chart,
    place_ticks,
    split_points,
    thin_points,
)


def show(value: float) -> str:
    return f"{value:g}"


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (5.6, 6.3, [5.6, 5.8, 6.0, 6.2, 6.4]),
        (0, 4200, [0, 2000, 4000, 6000]),
        (0, 2e-4, [0, 5e-5, 1e-4, 1.5e-4, 2e-4]),
        (3, 3, [1, 2, 3, 4, 5]),
        (0, 0, [-0.5, 0, 0.5]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round_and_hold_every_value(low: float, high: float, ticks: list[float]) -> None:
    assert place_ticks(low, high) == ticks


def test_a_chart_is_placed_in_percent() -> None:
    chart = build_chart(
        "Loss",
        [Series("training", "train", ((0, 4.0), (5, 2.0), (10, 0.0)))],
        x_label="step",
        format_y=show,
        level=("predicted", 1.0),
    )
    assert chart is not None
    assert chart.curves[0].path == "M0.00 0.00L50.00 50.00L100.00 100.00"
    assert [(tick.at, tick.label) for tick in chart.y_ticks] == [
        (100, "0"),
        (75, "1"),
        (50, "2"),
        (25, "3"),
        (0, "4"),
    ]
    assert [(tick.at, tick.label) for tick in chart.x_ticks] == [(0, "0"), (50, "5"), (100, "10")]
    assert chart.level is not None
    assert chart.level.at == 75
    assert chart.words == "Loss: training from 4 to 0, lowest 0"


def test_a_value_that_is_not_finite_breaks_the_curve() -> None:
    series = Series(
        "training", "train", ((0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0), (4, None), (5, 3.0), (6, 1.0))
    )
    chart = build_chart("Loss", [series], x_label="step", format_y=show)
    assert chart is not None
    assert chart.curves[0].path.count("M") == 3  # two lone points and one line
    assert "nan" not in chart.curves[0].path


@pytest.mark.parametrize("points", [(), ((0, None),), ((0, math.nan), (1, math.nan))])
def test_without_a_number_there_is_no_chart(points: tuple[tuple[float, float | None], ...]) -> None:
    assert build_chart("Loss", [Series("training", "train", points)], x_label="step", format_y=show) is None


def test_a_single_point_is_a_dot_in_the_plot() -> None:
    chart = build_chart("Loss", [Series("training", "train", ((7, 2.0),))], x_label="step", format_y=show)
    assert chart is not None
    assert chart.curves[0].path == "M0.00 50.00h0"


def test_thinning_keeps_every_peak_and_the_order() -> None:
    points = [(float(x), math.sin(x / 50)) for x in range(100_000)]
    points[61_803] = (61_803.0, 40.0)
    points[27_182] = (27_182.0, -40.0)
    kept = thin_points(points)
    assert len(kept) <= 600
    assert kept == sorted(kept)
    assert {(61_803.0, 40.0), (27_182.0, -40.0)} <= set(kept)


def test_a_long_curve_is_faint_under_its_running_mean() -> None:
    points = tuple((float(x), float(x % 2)) for x in range(200))
    chart = build_chart("Loss", [Series("training", "train", points, noisy=True)], x_label="step", format_y=show)
    assert chart is not None
    assert [(curve.name, curve.faint) for curve in chart.curves] == [("training", True), ("training, mean", False)]
    assert average_points([(0.0, 2.0), (1.0, 4.0), (2.0, 6.0), (3.0, 8.0)], 2) == [(0, 2), (1, 3), (2, 5), (3, 7)]


def test_breaks_split_a_curve() -> None:
    assert split_points([(0, 1.0), (1, None), (2, None), (3, 2.0)]) == [[(0, 1.0)], [(3, 2.0)]]
    assert split_points([]) == []
