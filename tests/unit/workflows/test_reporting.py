"""The report of a run: what stands in it, what is left out with a word, and that no text of a run becomes markup."""

from __future__ import annotations

import base64
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lora_jobs.errors import RunNotFoundError, SpecError
from lora_jobs.rendering.page import Sample
from lora_jobs.runs import (
    Run,
    Submission,
    Sweep,
    Task,
    append_metrics,
    append_submission,
    begin_attempt,
    create_run,
    create_sweep,
    end_attempt,
)
from lora_jobs.spec import load_spec, render_spec, replace_values
from lora_jobs.units import GIB
from lora_jobs.workflows.report_curves import find_waits
from lora_jobs.workflows.reporting import build_page, write_report

ROOT = Path(__file__).resolve().parents[3]
SPEC = render_spec(load_spec(ROOT / "jobs/gemma2_9b_svg.yaml"))
HOSTILE = "</pre><script>steal()</script><img src=x onerror=steal()>\"'&"


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "runs"
    root.mkdir()
    monkeypatch.setenv("LORA_JOBS_HOME", str(root))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return root


def make_run(runs: Path, **files: str) -> Run:
    estimate = {
        "fits": True,
        "verdict": "tight",
        "world_size": 2,
        "gpu": {"name": "A100-64", "usable_bytes": 63 * GIB},
        "estimate": {
            "peak_bytes": 60 * GIB,
            "allocated_peak_bytes": 40 * GIB,
            "components": {"base_weights": 17 * GIB},
        },
        "peak": {"what": "the fused loss", "when": "at step 1"},
    }
    stored = {"spec.yaml": SPEC, "estimate.json": json.dumps(estimate), **files}
    return create_run(runs, "gemma2_9b_svg-1", stored)


def train(run: Run, *, attempt: int = 1, steps: range, seconds: float = 0.0) -> None:
    for step in steps:
        append_metrics(
            run,
            {
                "time": time.time() + seconds + step,
                "attempt": attempt,
                "kind": "train",
                "step": step,
                "max_steps": 100,
                "loss": 9.0 / (step + 1),
                "learning_rate": 1e-4,
                "tokens_per_second": 1234.5,
                "memory_allocated_bytes": 38 * GIB,
                "memory_reserved_bytes": 41 * GIB,
                "memory_device_used_bytes": 43 * GIB,
            },
        )


def finish(run: Run) -> None:
    for step, phase, loss in ((0, "before", 5.0), (40, "after", 2.0)):
        row = {"kind": "eval", "phase": phase, "step": step, "eval_loss": loss, "perplexity": 2.718**loss}
        append_metrics(run, {"time": time.time(), "attempt": 2, **row})
    targets = {
        "eval_loss": {"expected": 2.5, "reached": 2.0, "met": True},
        "bleu": {"expected": 18.0, "reached": 7.25, "met": False},
    }
    append_metrics(run, {"kind": "final", "step": 40, "metrics": {"eval_loss": 2.0, "bleu": 7.25}, "targets": targets})
    sample = {"prompt": "p", "expected": "e", "without_adapter": "w", "with_adapter": "a"}
    append_metrics(run, {"kind": "sample", "step": 40, **sample})


def test_a_run_with_two_attempts(runs: Path) -> None:
    run = make_run(runs)
    now = time.time()
    append_submission(
        run, Submission(job_id="71", backend="local", submitted_at=now - 60, host="n", pid_created_at=1.0)
    )
    for number, state in ((1, "SAVED"), (2, "COMPLETED")):
        known = {"job_id": "71", "restart_count": number - 1}
        begin_attempt(run, **known, backend="local", host="node1", resume_from=None, first_step=20 * (number - 1))
        train(run, attempt=number, steps=range(20 * (number - 1), 20 * number))
        reason = "saved after SIGUSR2" if state == "SAVED" else "finished"
        end_attempt(run, **known, exit_code=0, state=state, reason=reason, last_committed_step=20 * number)
    finish(run)
    page = build_page(run.id)
    assert [chart.title for chart in page.charts] == ["Loss", "Learning rate", "Throughput", "Memory of one process"]
    assert page.charts[3].level is not None
    assert {tile.label: (tile.value, tile.note, tile.tone) for tile in page.tiles} | {"Time": ()} == {
        "Steps": ("39", "of 100", ""),
        "Held-out loss": ("2", "5 before", "good"),
        "Perplexity": ("7.388", "148.3 before", "good"),
        "Tokens/s": ("1,234", "last step", ""),
        "Memory, highest": ("38.0 GiB", "40.0 GiB predicted", ""),
        "Time": (),
    }
    assert page.targets is not None
    assert page.targets.rows == (("eval loss", "2.5", "2", "reached"), ("bleu", "18", "7.25", "not reached"))
    assert page.targets.tones == ("good", "bad")
    assert page.timeline is not None
    assert [span.label for span in page.timeline.spans] == ["1: saved", "2: completed"]
    assert page.timeline.spans[0].waited is not None
    assert page.attempts is not None
    assert [row[6] for row in page.attempts.rows] == ["saved after SIGUSR2", "finished"]
    assert page.estimate is not None
    assert page.estimate.verdict == "tight"
    assert page.estimate.measured is not None
    assert page.estimate.measured.rows[0] == ("allocated", "38.0 GiB", "40.0 GiB", "-5.0%")
    assert [sample.with_adapter for sample in page.samples] == ["a"]


def test_a_run_that_has_not_started_says_what_is_missing(runs: Path) -> None:
    page = build_page(make_run(runs).id)
    assert (page.charts, page.timeline, page.attempts, page.checkpoints, page.samples) == ((), None, None, None, ())
    said = " ".join(page.missing)
    for words in ("no step was trained yet", "has not started", "no attempt has written"):
        assert words in said
    write_report("gemma2_9b_svg-1")


@pytest.mark.parametrize(
    ("changes", "rows", "words"),
    [
        ({}, [], "the examples have no prompt."),
        ({"deepspeed.zero_stage": 3, "training.final_metrics": []}, [], "not taken under ZeRO-3"),
        ({"data.completion_only": False}, [], "data.completion_only: false"),
        ({}, [{"kind": "note", "event": "sample_failed", "reason": "no head"}], "could not be generated: no head"),
    ],
)
def test_a_finished_run_without_an_answer_says_why(
    runs: Path, changes: dict[str, Any], rows: list[dict[str, Any]], words: str
) -> None:
    spec = replace_values(load_spec(ROOT / "jobs/gemma2_9b_svg.yaml"), changes)
    run = make_run(runs, **{"spec.yaml": render_spec(spec)})
    known = {"job_id": "71", "restart_count": 0}
    begin_attempt(run, **known, backend="local", host="node1", resume_from=None, first_step=0)
    end_attempt(run, **known, exit_code=0, state="COMPLETED", reason="finished", last_committed_step=20)
    for row in rows:
        append_metrics(run, row)
    (line,) = [line for line in build_page(run.id).missing if line.startswith("Answers before and after:")]
    assert words in line


def test_damaged_records_cost_themselves_only(runs: Path) -> None:
    run = make_run(runs, **{"estimate.json": '{"fits": "maybe"', "git.json": "[]"})
    for row in (
        {"kind": "train", "step": "x", "loss": 1.0},
        {"kind": "train", "step": 1, "loss": "high", "time": "now", "tokens_per_second": None},
        {"kind": "eval", "step": 1, "eval_loss": None},
        {"kind": "final", "metrics": [], "targets": "none"},
        {"kind": "final", "metrics": {"bleu": "x"}, "targets": {"bleu": 3}},
        {"kind": "sample", "prompt": 3},
    ):
        append_metrics(run, row)
    (run.directory / "attempt-1.environment.json").write_text('{"gpus": [1], "ranks": {}, "packages": 3, "inputs": []}')
    assert "<html" in write_report(run.id).read_text()


class Tags(HTMLParser):
    """Every tag of a page with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))


def test_no_text_of_a_run_becomes_markup(runs: Path) -> None:
    run = make_run(runs, **{"git.json": json.dumps({"commit": HOSTILE, "changed": [HOSTILE]}), "git.diff": HOSTILE})
    plain = Tags(write_report(run.id).read_text())
    drawing = f'<svg viewBox="0 0 9 9" onload="steal()"><script>steal()</script><text>{HOSTILE}</text></svg>'
    sample = dict.fromkeys(("prompt", "expected", "without_adapter", "with_adapter"), HOSTILE + drawing)
    append_metrics(run, {"kind": "sample", "step": 1, **sample})
    known = {"job_id": "7", "restart_count": 0}
    begin_attempt(run, **known, backend="local", host=HOSTILE, resume_from=None, first_step=0)
    end_attempt(run, **known, exit_code=1, state="FAILED", reason=HOSTILE, last_committed_step=None)
    place = {"host": HOSTILE, "packages": [HOSTILE], "gpus": [{"name": HOSTILE}], "driver": HOSTILE}
    (run.directory / "attempt-1.environment.json").write_text(json.dumps(place))
    text = write_report(run.id).read_text()
    assert text.count("&lt;script&gt;steal()") >= 8
    tags = Tags(text).found
    assert {tag for tag, _ in tags} - {tag for tag, _ in plain.found} <= {"img", "i", "dd", "dt", "thead", "tbody",
                                                                         "table", "tr", "td", "th"}  # fmt: skip
    assert [name for _, attributes in tags for name in attributes if name.startswith("on")] == []
    assert [
        a["src"] for _, a in tags if "src" in a and not str(a["src"]).startswith("data:image/svg+xml;base64,")
    ] == []
    assert [a for _, a in tags if "href" in a or "action" in a] == []
    assert re.findall(r"https?://(?!www\.w3\.org)", text) == []


def test_a_drawing_is_an_image_and_an_odd_one_is_text_only() -> None:
    def draw(prompt: str) -> str | None:
        return Sample(prompt, "", "", "").drawing

    address = draw('what? <svg viewBox="0 0 1 1"><rect/></svg> say')
    assert address is not None
    drawn = base64.b64decode(address.partition(",")[2]).decode()
    assert drawn == '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"><rect/></svg>'
    assert draw('<svg xmlns="a"></svg>') is not None
    assert draw("no drawing") is None
    assert draw("<svg><!ENTITY a 'b'></svg>") is None
    assert draw("<svg>" + "x" * 70_000 + "</svg>") is None


def test_a_report_replaces_a_report_and_nothing_else(runs: Path, tmp_path: Path) -> None:
    run = make_run(runs)
    assert write_report(None) == run.directory / "report.html"
    assert write_report(run.id) == run.directory / "report.html"
    assert write_report(run.id, tmp_path) == tmp_path / "gemma2_9b_svg-1.html"
    other = tmp_path / "notes.html"
    other.write_text("mine")
    with pytest.raises(SpecError, match="is no report"):
        write_report(run.id, other)
    assert other.read_text() == "mine"
    with pytest.raises(RunNotFoundError):
        write_report("nobody")


def test_a_task_of_a_sweep_has_a_report_and_the_sweep_has_none(runs: Path) -> None:
    task: dict[str, Any] = {"lora.r": 8}
    sweep = Sweep(runs / "g-sweep-1", "g", ("lora.r",), (Task("g-sweep-1-0", task),))
    create_sweep(sweep, "", {"g-sweep-1-0": {"spec.yaml": SPEC}}, {"git.json": '{"commit": "c0ffee", "changed": []}'})
    with pytest.raises(SpecError, match="is a sweep") as caught:
        write_report("g-sweep-1")
    assert "g-sweep-1-0" in (caught.value.hint or "")
    assert "c0ffee" in write_report("g-sweep-1-0").read_text()


def test_a_requeued_attempt_waits_from_the_end_of_the_one_before() -> None:
    assert find_waits([(10.0, 20.0), (30.0, 40.0), (60.0, 70.0)], [4.0, 55.0]) == [4.0, 20.0, 55.0]
    assert find_waits([(10.0, 20.0)], []) == [10.0]
