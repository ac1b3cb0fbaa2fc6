"""Metrics: all of them, or the last one without reading the file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lora_jobs.runs import Run, append_metrics, create_run, latest_metrics, load_metrics

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return create_run(tmp_path / "runs", "a-1", {"spec.yaml": "x"})


def test_records_come_back_in_order(run: Run) -> None:
    assert load_metrics(run) == []
    assert latest_metrics(run) is None
    records = [{"step": step, "kind": "train", "loss": 1 / step} for step in range(1, 4)]
    records.append({"step": 3, "kind": "eval", "eval_loss": 0.5})
    for record in records:
        append_metrics(run, record)
    assert load_metrics(run) == records
    assert latest_metrics(run) == records[3]
    assert latest_metrics(run, "train") == records[2]
    assert latest_metrics(run, "sample") is None


def test_a_loss_that_is_no_number_is_kept_as_that(run: Run) -> None:
    append_metrics(run, {"step": 1, "kind": "train", "loss": float("nan")})
    assert latest_metrics(run) == {"step": 1, "kind": "train", "loss": None, "not_finite": ["loss"]}


def test_a_torn_last_line_is_not_the_latest(run: Run) -> None:
    append_metrics(run, {"step": 1, "kind": "train"})
    with run.metrics_path.open("ab") as stream:
        stream.write(b'{"step": 2, "ki')
    assert latest_metrics(run) == {"step": 1, "kind": "train"}


@pytest.mark.parametrize("size", [10, 1000, 65_000, 70_000, 300_000])
def test_the_latest_of_a_long_file(run: Run, size: int) -> None:
    lines = [b'{"step": 1, "kind": "eval"}\n', b'{"step": 2, "kind": "train", "x": "%s"}\n' % (b"y" * size)]
    lines += [b'{"step": %d, "kind": "note"}\n' % step for step in range(3, 3000)]
    run.metrics_path.write_bytes(b"".join(lines))
    assert latest_metrics(run) == {"step": 2999, "kind": "note"}
    assert latest_metrics(run, "train") == {"step": 2, "kind": "train", "x": "y" * size}
    assert latest_metrics(run, "eval") == {"step": 1, "kind": "eval"}
    assert latest_metrics(run, "sample") is None


def test_a_look_at_a_long_run_stays_short(run: Run) -> None:
    """Millions of steps, one evaluation at their beginning: it is found, unless only the end is to be read."""
    append_metrics(run, {"kind": "eval", "step": 0})
    with run.metrics_path.open("a") as file:
        file.writelines(f'{{"kind": "train", "step": {step}, "note": "{"x" * 100}"}}\n' for step in range(20_000))
    assert latest_metrics(run, "eval") == {"kind": "eval", "step": 0}
    assert latest_metrics(run, "eval", most_bytes=1 << 16) is None
    last = latest_metrics(run, "train", most_bytes=1)
    assert last is not None
    assert last["step"] == 19_999
