"""Runs ranked by what they wrote: held-out loss first, memory, speed and cost beside it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from lora_jobs.cli.show_compare import draw_place
from lora_jobs.errors import RunNotFoundError, SpecError
from lora_jobs.runs import (
    Run,
    Sweep,
    Task,
    append_metrics,
    begin_attempt,
    create_run,
    create_sweep,
    end_attempt,
    find_runs_root,
)
from lora_jobs.spec import parse_spec, render_spec
from lora_jobs.workflows.comparing import compare_runs, draw_losses

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import FakeCluster

SPEC = "name: a\nmodel: {name_or_path: m}\nlora: {r: 4}\ndata: {train: t}\ntraining: {max_steps: 4}\n"
ESTIMATE = json.dumps({"world_size": 2, "estimate": {"peak_bytes": 9, "allocated_peak_bytes": 7}})


def build_files(*overrides: str) -> dict[str, str]:
    spec = render_spec(parse_spec(SPEC, source="s", overrides=overrides))
    return {"spec.yaml": spec, "script.sbatch": "#SBATCH --time=10\n", "estimate.json": ESTIMATE}


def train(run: Run, *losses: float, speed: float = 100.0, evaluated: dict[int, float] | None = None) -> None:
    """The records of a run that trained a step per loss; held out before, and after the steps named."""
    begin = {"job_id": "1", "restart_count": 0}
    begin_attempt(run, **begin, backend="local", host="here", resume_from=None, first_step=0)
    append_metrics(run, {"kind": "eval", "phase": "before", "step": 0, "eval_loss": 0.001})
    for step, loss in enumerate(losses, 1):
        numbers = {"loss": loss, "tokens_per_second": speed, "memory_allocated_bytes": 5 + step}
        append_metrics(run, {"kind": "train", "step": step, "attempt": 1, "max_steps": len(losses), **numbers})
        if step in (evaluated or {}):
            append_metrics(run, {"kind": "eval", "step": step, "eval_loss": (evaluated or {})[step]})
    end_attempt(run, **begin, exit_code=0, state="COMPLETED", reason=None, last_committed_step=None)


@pytest.fixture
def sweep(cluster: FakeCluster) -> Sweep:
    tasks = tuple(Task(f"a-sweep-1-{number}", {"lora.r": 2**number}) for number in range(4))
    sweep = Sweep(find_runs_root() / "a-sweep-1", "a", ("lora.r",), tasks)
    create_sweep(sweep, "", {task.run: build_files() for task in tasks})
    first, second, third, _ = sweep.runs
    train(first, 4.0, 3.0, speed=50, evaluated={1: 2.5, 2: 2.9})
    train(second, 4.0, 2.0, speed=70, evaluated={1: 2.6, 2: 2.2})
    train(third, 4.0, 1.0, 1.5, speed=60)
    return sweep


def test_the_best_held_out_loss_ranks_and_the_base_models_does_not_count(sweep: Sweep):
    found = compare_runs(["a-sweep-1"])
    assert (found.by, found.sweep, found.keys) == ("eval_loss", "a-sweep-1", ("lora.r",))
    rows = [(run.run[-1], dict(run.values), run.best_eval_loss, run.final_eval_loss, run.loss) for run in found.runs]
    assert rows == [
        ("1", {"lora.r": 2}, 2.2, 2.2, 2.0),
        ("0", {"lora.r": 1}, 2.5, 2.9, 3.0),
        ("2", {"lora.r": 4}, None, None, 1.5),
        ("3", {"lora.r": 8}, None, None, None),
    ]
    best = found.runs[0]
    assert (best.tokens_per_second, best.memory_peak_bytes, best.predicted_bytes) == (70.0, 7, 7)
    assert best.gpu_hours is not None
    document = json.loads(json.dumps(found.to_json()))
    assert [row["rank"] for row in document["runs"]] == [1, 2, 3, 4]
    assert "curve" not in document["runs"][0]


@pytest.mark.parametrize(
    ("by", "order"), [("final_eval_loss", "1023"), ("loss", "2103"), ("tokens_per_second", "1203"), ("memory", "0123")]
)
def test_other_rankings(sweep: Sweep, by: str, order: str):
    assert "".join(run.run[-1] for run in compare_runs(["a-sweep-1"], by=by).runs) == order


def test_single_runs_show_what_differs_between_their_specs(cluster: FakeCluster):
    root = find_runs_root()
    train(create_run(root, "a-1", build_files()), 3.0)
    train(create_run(root, "a-2", build_files("lora.r=8", "resources.time='2'", "training.seed=1")), 2.0)
    for names in (["a"], ["a-1", "a-2"], ["a-2", str(root / "a-1"), "a-1"]):
        found = compare_runs(names)
        rows = [(run.run, dict(run.values)) for run in found.runs]
        assert rows == [
            ("a-2", {"lora.r": 8, "training.seed": 1}),
            ("a-1", {"lora.r": 4, "training.seed": 42}),
        ]
        assert (found.by, found.sweep) == ("loss", None)
        assert "ranked by the training loss" in found.notes[-1]
    with pytest.raises(RunNotFoundError, match="no run 'b'"):
        compare_runs(["a", "b"])


def test_the_curves_as_svg(sweep: Sweep, tmp_path: Path):
    pytest.importorskip("matplotlib")
    path = draw_losses(compare_runs(["a-sweep-1"]), tmp_path / "losses.svg")
    text = path.read_text()
    assert text.startswith("<?xml")
    assert "<svg" in text
    with pytest.raises(SpecError, match=r"ends in \.svg"):
        draw_losses(compare_runs(["a-sweep-1"]), tmp_path / "losses.png")


def test_a_place_between_the_best_and_the_worst():
    assert [draw_place(number, 1.0, 3.0, 5) for number in (1.0, 2.0, 3.0)] == ["●····", "··●··", "····●"]


def test_gpu_hours_count_each_start_with_its_own_gpus(cluster: FakeCluster):
    """Six hours on four, one on one after `resume --gpus 1`, one of a record that does not say: the estimate's two."""
    run = create_run(find_runs_root(), "a-1", build_files())
    for number, (hours, gpus) in enumerate([(6, 4), (1, 1), (1, None)]):
        known = {"job_id": str(number), "restart_count": 0}
        begin_attempt(run, **known, backend="slurm", host="n1", resume_from=None, first_step=0, world_size=gpus)
        end_attempt(run, **known, exit_code=0, state="SAVED", reason=None, last_committed_step=None)
        attempts = [json.loads(line) for line in run.attempts_path.read_text().splitlines()]
        attempts[-1].update(started_at=0.0, ended_at=hours * 3600.0)
        run.attempts_path.write_text("".join(json.dumps(attempt) + "\n" for attempt in attempts))
    (found,) = compare_runs(["a-1"]).runs
    assert found.gpu_hours == 6 * 4 + 1 + 2
