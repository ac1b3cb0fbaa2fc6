"""Curves as geometry: points in percent of a plot, ticks with their labels. What draws them needs no arithmetic."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

Point = tuple[float, float | None]
"""x and y; without a y the curve is broken there."""

MOST_POINTS = 600
SMOOTH_FROM = 80
"""Noisy curves of more points than this are drawn faint, under their running mean."""


class Series(Struct, frozen=True):
    """One curve: `role` chooses its colour, `dots` marks every point; a `noisy` one gets a running mean."""

    name: str
    role: str
    points: tuple[Point, ...]
    dots: bool = False
    noisy: bool = False


class Tick(Struct, frozen=True):
    """A place on an axis, in percent from its start, and what stands there."""

    at: float
    label: str


class Curve(Struct, frozen=True):
    """A drawn series: SVG path data, in percent of the plot with y downwards; `dots` as a path of its own."""

    name: str
    role: str
    path: str
    dots: str = ""
    faint: bool = False


class Level(Struct, frozen=True):
    """A horizontal line, such as what was predicted."""

    name: str
    at: float


class Chart(Struct, frozen=True):
    """One plot. `words` say in a sentence what it shows, for who cannot see it."""

    title: str
    x_label: str
    words: str
    curves: tuple[Curve, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    level: Level | None = None


def build_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    format_y: Callable[[float], str],
    level: tuple[str, float] | None = None,
    from_zero: bool = False,
) -> Chart | None:
    """The chart of these series; None where there is no point to draw. Values that are not finite break a curve."""
    kept = [replace(one, points=clean_points(one.points)) for one in series]
    kept = [one for one in kept if any(y is not None for _, y in one.points)]
    if not kept:
        return None
    ys = [y for one in kept for _, y in one.points if y is not None] + ([level[1]] if level else [])
    xs = [x for one in kept for x, _ in one.points]
    y_marks = place_ticks(min(0.0, *ys) if from_zero else min(ys), max(ys))
    low, high = y_marks[0], y_marks[-1]
    left, right = min(xs), max(xs)
    right = right if right > left else left + 1

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return 100 * (point[0] - left) / (right - left), 100 * (high - point[1]) / (high - low)

    curves = [curve for one in kept for curve in draw_series(one, place)]
    x_marks = [mark for mark in place_ticks(left, right, about=4) if left <= mark <= right]
    return Chart(
        title=title,
        x_label=x_label,
        words=f"{title}: " + "; ".join(describe_series(one, format_y) for one in kept),
        curves=tuple(curves),
        x_ticks=tuple(
            Tick(round(100 * (mark - left) / (right - left), 2), f"{mark:,.0f}" if mark == round(mark) else f"{mark:g}")
            for mark in x_marks
        ),
        y_ticks=tuple(Tick(round(100 * (high - mark) / (high - low), 2), format_y(mark)) for mark in y_marks),
        level=None if level is None else Level(level[0], round(100 * (high - level[1]) / (high - low), 2)),
    )


def clean_points(points: Iterable[Point]) -> tuple[Point, ...]:
    """Points whose y is no finite number become breaks."""
    return tuple((x, y if y is not None and math.isfinite(y) else None) for x, y in points if math.isfinite(x))


def draw_series(series: Series, place: Callable[[tuple[float, float]], tuple[float, float]]) -> list[Curve]:
    """The curve of a series; of a long one its running mean over a faint curve."""
    pieces = split_points(series.points)
    count = sum(len(piece) for piece in pieces)
    path = "".join(draw_line([place(point) for point in thin_points(piece)]) for piece in pieces)
    dots = "".join(draw_dot(place(point)) for piece in pieces for point in piece) if series.dots else ""
    if not series.noisy or count <= SMOOTH_FROM:
        return [Curve(series.name, series.role, path, dots)]
    smooth = [thin_points(average_points(piece, max(5, count // 40))) for piece in pieces]
    mean = "".join(draw_line([place(point) for point in piece]) for piece in smooth)
    return [Curve(series.name, series.role, path, faint=True), Curve(f"{series.name}, mean", series.role, mean)]


def split_points(points: Sequence[Point]) -> list[list[tuple[float, float]]]:
    """The pieces between breaks."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append((x, y))
    return [piece for piece in pieces if piece]


def thin_points(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most `most` points that keep every peak and valley: the lowest and the highest of each stretch."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        low, high = (choose(stretch, key=lambda point: point[1]) for choose in (min, max))
        kept += sorted({low, high})
    return kept


def average_points(points: Sequence[tuple[float, float]], width: int) -> list[tuple[float, float]]:
    """The running mean over the last `width` points."""
    total, averaged = 0.0, []
    for number, (x, y) in enumerate(points):
        total += y - (points[number - width][1] if number >= width else 0.0)
        averaged.append((x, total / min(number + 1, width)))
    return averaged


def draw_line(points: Sequence[tuple[float, float]]) -> str:
    """SVG path data through the points; of a single point a dot."""
    if len(points) == 1:
        return draw_dot(points[0])
    return "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points)


def draw_dot(point: tuple[float, float]) -> str:
    """A line of no length: with round caps it is a dot, however the plot is stretched."""
    return f"M{point[0]:.2f} {point[1]:.2f}h0"


def place_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers from at most `low` to at least `high`, in steps of 1, 2 or 5 times a power of ten."""
    if high <= low:
        low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12 - math.floor(math.log10(step))) for number in range(first, last + 1)]


def describe_series(series: Series, format_y: Callable[[float], str]) -> str:
    """A series in words: where it begins, ends, and its lowest value."""
    ys = [y for _, y in series.points if y is not None]
    return f"{series.name} from {format_y(ys[0])} to {format_y(ys[-1])}, lowest {format_y(min(ys))}"
