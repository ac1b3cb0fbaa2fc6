"""The curves and the time line of a report, from what a run wrote."""

from __future__ import annotations

from datetime import datetime
from itertools import count
from typing import TYPE_CHECKING, Any, TypeGuard

from lora_jobs.rendering.charts import Chart, Series, Tick, build_chart
from lora_jobs.rendering.page import Span, Timeline
from lora_jobs.units import GIB, format_gib

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lora_jobs.rendering.charts import Point
    from lora_jobs.runs import Submission
    from lora_jobs.workflows.detailing import RunPage, Start
    from lora_jobs.workflows.progress import Prediction

MOST_SPANS = 30
TONES = {"COMPLETED": "good", "SAVED": "good", "RUNNING": "busy", "PENDING": "warn", "CANCELLED": "warn"}


def find_tone(state: str) -> str:
    """The colour of a state; what is not listed went wrong, or was stopped from outside."""
    return TONES.get(state, "bad" if state not in ("REQUEUED", "PREEMPTED", "SUSPENDED") else "warn")


def draw_charts(rows: Sequence[dict[str, Any]], predicted: Prediction) -> tuple[Chart, ...]:
    """Loss, learning rate, throughput over the steps; memory over the time. Without a point there is no chart."""
    train = order_steps(row for row in rows if row.get("kind") == "train")
    held_out = order_steps(row for row in rows if row.get("kind") == "eval")
    charts = [
        build_chart(
            "Loss",
            [
                Series("training", "train", select(train, "loss"), noisy=True),
                Series("held out", "eval", select(held_out, "eval_loss"), dots=True),
            ],
            x_label="step",
            format_y=format_number,
        ),
        build_chart(
            "Learning rate",
            [Series("learning rate", "rate", select(train, "learning_rate"))],
            x_label="step",
            format_y=format_small,
            from_zero=True,
        ),
        build_chart(
            "Throughput",
            [Series("tokens/s", "speed", select(train, "tokens_per_second"), noisy=True)],
            x_label="step",
            format_y=format_number,
            from_zero=True,
        ),
        draw_memory(rows, predicted),
    ]
    return tuple(chart for chart in charts if chart is not None)


def draw_memory(rows: Sequence[dict[str, Any]], predicted: Prediction) -> Chart | None:
    """What rank 0 held over the hours: on a GPU allocated and reserved, else the process; and what was predicted."""
    measured = [row for row in rows if is_number(row.get("time")) and row.get("kind") in ("train", "eval")]
    if not measured:
        return None
    on_gpu = any(row.get("memory_allocated_bytes") for row in measured)
    names = (
        [("allocated, highest so far", "memory", "memory_allocated_bytes"),
         ("reserved", "host", "memory_reserved_bytes")]
        if on_gpu
        else [("the process", "memory", "host_memory_bytes")]
    )  # fmt: skip
    began = min(row["time"] for row in measured)
    hours = max(row["time"] for row in measured) - began > 2 * 3600
    unit = 3600 if hours else 60
    level = predicted.allocated_peak_bytes if on_gpu else None
    return build_chart(
        "Memory of one process",
        [Series(name, role, follow_time(measured, key, began, unit)) for name, role, key in names],
        x_label="hours" if hours else "minutes",
        format_y=lambda number: f"{number:g} GiB",
        level=("allocated, predicted", level / GIB) if level else None,
        from_zero=True,
    )


def order_steps(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by step; of a step that was trained again after a kill the later one."""
    found = {row["step"]: row for row in rows if is_number(row.get("step"))}
    return [found[step] for step in sorted(found)]


def select(rows: Iterable[dict[str, Any]], key: str) -> tuple[Point, ...]:
    """One column over the steps; what is no number breaks the curve."""
    return tuple((row["step"], row[key] if is_number(row[key]) else None) for row in rows if key in row)


def follow_time(rows: Sequence[dict[str, Any]], key: str, began: float, unit: float) -> tuple[Point, ...]:
    """One column of bytes as GiB over the time, broken between attempts."""
    points: list[Point] = []
    attempt = None
    for row in rows:
        at = (row["time"] - began) / unit
        if attempt is not None and row.get("attempt") != attempt:
            points.append((at, None))
        attempt = row.get("attempt")
        if is_number(value := row.get(key)):
            points.append((at, value / GIB))
    return tuple(points)


def draw_timeline(
    page: RunPage, submissions: Sequence[Submission], rows: Sequence[dict[str, Any]], now: float
) -> Timeline | None:
    """Every attempt over the clock, with the wait before it and its commits; None before the first."""
    starts = [start for start in page.starts if start.started]
    shown = starts[-MOST_SPANS:]
    if not shown:
        return None
    spans = [find_span(start, rows, page.status.active, now) for start in shown]
    waits = find_waits(spans, [each.submitted_at for each in submissions])
    first, last = min(waits), max(end for _, end in spans)
    length = max(last - first, 1.0)
    commits = [verdict.committed_at for verdict in page.checkpoints if verdict.good and verdict.committed_at]

    def place(moment: float) -> float:
        return round(100 * (moment - first) / length, 2)

    drawn = []
    for number, start, (begin, end), wait in zip(
        count(len(starts) - len(shown) + 1), shown, spans, waits, strict=False
    ):
        drawn.append(
            Span(
                label=f"{number}: {start.state.lower()}",
                words=f"{format_moment(begin)} to {format_moment(end)}, {start.reason or start.state.lower()}",
                tone=find_tone(start.state),
                left=place(begin),
                width=round(max(100 * (end - begin) / length, 0.3), 2),
                marks=tuple(place(moment) for moment in commits if begin <= moment <= end),
                waited=(place(wait), round(place(begin) - place(wait), 2)) if begin - wait > length / 200 else None,
            )
        )
    clock = slice(11, 19) if length < 600 else slice(5, 16)
    ticks = tuple(Tick(at, format_moment(first + at / 100 * length)[clock]) for at in (12.0, 50.0, 88.0))
    older = f"; the first {len(starts) - len(shown)} are not drawn" if len(starts) > len(shown) else ""
    return Timeline(tuple(drawn), ticks, f"pale: waiting; marks: commits of checkpoints that are still there{older}")


def find_waits(spans: Sequence[tuple[float, float]], submitted: Sequence[float]) -> list[float]:
    """Since when each attempt waited: its submission, or the end of the attempt before it, whichever is later."""
    waits: list[float] = []
    earlier = float("-inf")
    for begin, end in spans:
        waits.append(max([earlier, *(moment for moment in submitted if moment <= begin)]))
        waits[-1] = min(begin, waits[-1]) if waits[-1] > float("-inf") else begin
        earlier = end
    return waits


def find_span(start: Start, rows: Sequence[dict[str, Any]], active: bool, now: float) -> tuple[float, float]:
    """When an attempt began and ended; one that was killed ended with the last thing it wrote."""
    begin = datetime.fromisoformat(start.started or "").timestamp()
    if start.ended:
        return begin, max(begin, datetime.fromisoformat(start.ended).timestamp())
    if active and start.state == "RUNNING":
        return begin, max(begin, now)
    written = [row["time"] for row in rows if row.get("attempt") == start.number and is_number(row.get("time"))]
    return begin, max([begin, *written])


def format_moment(seconds: float) -> str:
    """Local time, as ISO without the T."""
    return datetime.fromtimestamp(seconds).isoformat(sep=" ", timespec="seconds")


def format_number(value: float) -> str:
    """At most four digits that count: 5.752, 248, 12,400."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def format_small(value: float) -> str:
    """A learning rate: 0, 2e-4, 0.01."""
    return f"{value:g}" if value == 0 or value >= 0.01 else f"{value:.2g}".replace("e-0", "e-")


def format_bytes(value: int | None) -> str:
    """GiB, or nothing."""
    return "" if value is None else format_gib(value)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of a record is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool)
