"""What a run came to: its final metrics beside its targets, on the page of the run and at its end."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from lora_jobs.cli.show_page import show_page
from lora_jobs.cli.show_runs import show_outcome
from lora_jobs.runs import Run, append_metrics, create_run, find_runs_root
from lora_jobs.workflows.detailing import describe_run
from lora_jobs.workflows.results import Result, load_outcome, load_results

if TYPE_CHECKING:
    from pathlib import Path

SPEC = """
name: aimed
model: {name_or_path: org/model}
lora: {r: 8}
data: {train: train.jsonl, eval: eval.jsonl}
training: {max_steps: 3, final_metrics: [bleu], targets: {eval_loss: 2, bleu: 18}}
"""
FINAL: dict[str, Any] = {
    "kind": "final",
    "step": 3,
    "metrics": {"eval_loss": 2.25, "perplexity": 9.49, "bleu": 21.3},
    "targets": {
        "eval_loss": {"expected": 2, "reached": 2.25, "met": False},
        "bleu": {"expected": 18, "reached": 21.3, "met": True},
    },
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("LORA_JOBS_HOME", str(tmp_path / "runs"))
    return create_run(find_runs_root(), "aimed-1", {"spec.yaml": SPEC})


def test_before_the_end_the_targets_stand_alone(run: Run) -> None:
    assert load_results(run) == (Result("eval_loss", None, 2, None), Result("bleu", None, 18, None))


def test_at_the_end_each_metric_stands_beside_its_target(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for phase, loss in (("before", 3.0), ("after", 2.25)):
        append_metrics(run, {"kind": "eval", "phase": phase, "step": 0, "eval_loss": loss})
    append_metrics(run, FINAL)
    assert load_results(run) == (
        Result("eval_loss", 2.25, 2, met=False),
        Result("perplexity", 9.49, None, None),
        Result("bleu", 21.3, 18, met=True),
    )
    page = describe_run("aimed-1")
    assert page.to_json()["results"][2] == {"name": "bleu", "reached": 21.3, "expected": 18, "met": True}
    show_page(page)
    shown = capsys.readouterr().out
    assert "final eval loss   2.25 (2 expected: NOT reached)" in shown
    assert "final bleu        21.3 (18 expected: reached)" in shown


def test_the_end_of_a_followed_run_says_what_it_came_to(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    from msgspec.structs import replace

    for phase, loss in (("before", 3.0), ("after", 2.25)):
        append_metrics(run, {"kind": "eval", "phase": phase, "step": 0, "eval_loss": loss})
    append_metrics(run, FINAL)
    status = replace(describe_run("aimed-1").status, state="COMPLETED", total_steps=3)
    show_outcome(run, status, load_outcome(run))
    shown = capsys.readouterr().out
    assert "  held-out loss   3.0000 before, 2.2500 after\n  perplexity      20.09 before, 9.49 after\n" in shown
    assert "eval loss 2.25 (2 expected: NOT reached); perplexity 9.49; bleu 21.3 (18 expected: reached)\n" in shown


@pytest.mark.parametrize(
    "damaged", [{"metrics": [], "targets": "none"}, {"metrics": {"bleu": "x"}, "targets": {"bleu": 3}}]
)
def test_a_damaged_record_holds_no_results(damaged: dict[str, Any], run: Run) -> None:
    append_metrics(run, {"kind": "final", **damaged})
    assert load_results(run) == ()


def test_a_spec_of_another_version_has_no_targets(run: Run) -> None:
    run.spec_path.write_text(json.dumps({"name": "x", "new": 1}))
    assert load_results(run) == ()
