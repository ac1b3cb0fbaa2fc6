"""Plans: which rows there are, what each asks for, their order, and what is said where Slurm says nothing."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lora_jobs.cli.main import app
from lora_jobs.errors import SpecError
from lora_jobs.runs import create_run
from lora_jobs.spec import load_environment, load_spec, render_spec, replace_values
from lora_jobs.workflows.layouts import list_layouts, split_batch
from lora_jobs.workflows.planning import find_row_overrides, plan_spec
from lora_jobs.workflows.submitting import render_job

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import FakeCluster

    from lora_jobs.workflows.planning import JobPlan

ACCEPTED = "sbatch: Job 7 to start at {start} using 8 processors on nodes n1 in partition x"


def names(plan: JobPlan) -> list[str]:
    return [row.name for row in plan.rows]


def test_rows_and_what_each_asks_for(make_spec: Callable[..., Path]):
    layouts, notes = list_layouts(load_spec(make_spec()), load_environment("here"))
    assert notes == ["serial: here names no GPUs for it, left out"]
    assert {layout.name: dict(layout.settings) for layout in layouts if layout.partition == "small"} == {
        "small:1x1": {
            "resources.partition": "small", "resources.nodes": 1, "resources.gpus_per_node": 1,
            "resources.time": "02:00:00", "resources.mem": "30G",
            "training.per_device_train_batch_size": 2, "training.gradient_accumulation_steps": 8,
        },
        "small:1x2": {
            "resources.partition": "small", "resources.nodes": 1, "resources.gpus_per_node": 2,
            "resources.time": "02:00:00", "resources.mem": "60G",
            "training.per_device_train_batch_size": 2, "training.gradient_accumulation_steps": 4,
        },
    }  # fmt: skip
    assert [layout.name for layout in layouts if layout.partition == "big"] == [
        "big:1x1", "big:1x2", "big:1x4", "big:2x4", "big/quick:1x1", "big/quick:1x2", "big/quick:1x4",
    ]  # fmt: skip
    four = next(layout for layout in layouts if layout.name == "big:2x4").settings
    assert (four["resources.mem"], four["training.gradient_accumulation_steps"]) == ("100G", 1)
    assert four["resources.time"] == "12:00:00"


def test_the_batch_of_a_step_never_changes(make_spec: Callable[..., Path]):
    spec = load_spec(make_spec())
    whole = 2 * 4 * 2
    for world in (1, 2, 4, 8, 16):
        found = split_batch(spec, world)
        assert found is not None
        micro, accumulation = found.values()
        assert micro * accumulation * world == whole
        assert micro <= 2
    assert split_batch(spec, 3) is None
    assert split_batch(spec, 32) is None


def test_sorted_by_expected_finish_and_nothing_is_submitted(cluster: FakeCluster, make_spec: Callable[..., Path]):
    cluster.answer("sbatch", ("--test-only", ACCEPTED.format(start="2030-01-01T10:00:00")), stderr=True)
    plan = plan_spec(make_spec())
    assert {row.expected_start for row in plan.rows} == {"2030-01-01T10:00:00"}
    finishes = [row.expected_finish for row in plan.rows]
    assert None not in finishes
    assert [str(finish)[:16] for finish in finishes] == sorted(str(finish)[:16] for finish in finishes)
    assert plan.rows[0].name.startswith("big")
    assert all(call.startswith("sbatch --test-only ") for call in cluster.calls())
    assert len(cluster.calls()) == len(plan.rows)
    assert not Path("../runs").exists()
    row = plan.rows[0].to_json()
    assert row["duration_seconds"] == pytest.approx(sum(row["duration_parts"].values()), abs=3)
    assert row["gpu_hours"] == pytest.approx(row["duration_seconds"] * row["world_size"] / 3600, abs=0.01)
    json.dumps(plan.to_json(), allow_nan=False)


def test_the_scheduler_gives_no_estimate(cluster: FakeCluster, make_spec: Callable[..., Path]):
    cluster.answer("sbatch", ("", "sbatch: something new"), stderr=True)
    plan = plan_spec(make_spec())
    assert {row.start_note for row in plan.rows} == {"the scheduler gives no estimate"}
    assert {row.expected_finish for row in plan.rows} == {None}
    durations = [row.duration.seconds for row in plan.rows if row.duration]
    assert durations == sorted(durations)


def test_refused_rows_say_why_and_stand_last(cluster: FakeCluster, make_spec: Callable[..., Path]):
    cluster.answer(
        "sbatch", ("", "allocation failure: Requested node configuration is not available"), status=1, stderr=True
    )
    plan = plan_spec(make_spec())
    assert not any(row.possible for row in plan.rows)
    assert plan.rows[0].problems[0].startswith("sbatch refuses it: no node of the partition has as many GPUs")


def test_a_qos_that_refuses_me_is_no_row(cluster: FakeCluster, make_spec: Callable[..., Path]):
    cluster.answer("sbatch", ("", "allocation failure: Invalid qos specification"), status=1, stderr=True)
    assert not any("quick" in name for name in names(plan_spec(make_spec())))


def test_a_time_far_above_the_need_is_pointed_out(make_spec: Callable[..., Path]):
    plan = plan_spec(make_spec())
    (advice,) = [note for note in plan.notes if "may start sooner" in note]
    best = plan.rows[0]
    assert advice.startswith(f"{best.name} asks for 12:00:00 and needs about 00:0")
    assert "--set resources.time=00:12:00" in advice


def test_without_slurm_durations_are_all(make_spec: Callable[..., Path]):
    plan = plan_spec(make_spec())
    assert "sbatch is not on PATH: no expected starts; sorted by duration" in plan.notes
    assert {row.start_note for row in plan.rows} == {"sbatch is not here"}


def test_a_controller_that_is_away_is_asked_once(cluster: FakeCluster, make_spec: Callable[..., Path]):
    cluster.answer("sbatch", ("", "sbatch: error: Unable to contact slurm controller"), status=1, stderr=True)
    plan = plan_spec(make_spec())
    assert len(cluster.calls()) == 1
    assert {row.start_note for row in plan.rows} == {"no answer from Slurm"}
    assert [note for note in plan.notes if note.startswith("no expected starts: Slurm's controller")]
    assert all(row.possible for row in plan.rows)


def test_what_does_not_fit_is_not_asked(cluster: FakeCluster, make_spec: Callable[..., Path]):
    cluster.answer("sbatch", ("--test-only", ACCEPTED.format(start="2030-01-01T10:00:00")), stderr=True)
    plan = plan_spec(make_spec(("gemma-2-2b,", "gemma-2-9b,")))
    fits = {row.name: row.verdict.fits for row in plan.rows if row.verdict}
    assert not fits["small:1x2"]
    assert fits["big:1x4"]
    assert names(plan)[-1].startswith("small")
    assert len(cluster.calls()) == sum(fits.values())


def test_longer_than_the_limit_is_several_jobs(cluster: FakeCluster, make_spec: Callable[..., Path]):
    cluster.answer("sbatch", ("--test-only", ACCEPTED.format(start="2030-01-01T10:00:00")), stderr=True)
    plan = plan_spec(make_spec(("max_steps: 100", "max_steps: 100000")))
    rows = {row.name: row for row in plan.rows}
    assert rows["small:1x2"].jobs > 1
    assert not any("quick" in name for name in rows), "a QOS that nobody asked for must be long enough"
    without = plan_spec(make_spec(("max_steps: 100", "max_steps: 100000")), ["resume.auto=false"])
    (problem,) = next(row for row in without.rows if row.name == "small:1x2").problems
    assert "resume allows 1" in problem


def test_epochs_without_data_have_no_duration(make_spec: Callable[..., Path]):
    path = make_spec(("max_steps: 100", "num_train_epochs: 3"))
    Path("train.jsonl").unlink()
    plan = plan_spec(path)
    assert {row.duration for row in plan.rows} == {None}
    assert any("no such file" in note for note in plan.notes)


def test_earlier_runs_of_the_same_model_give_the_speed(make_spec: Callable[..., Path], tmp_path: Path):
    path = make_spec()
    spec = load_spec(path)
    for number, (model, speeds) in enumerate(
        [("google/gemma-2-2b", (9, 950, 1900, 2850)), ("google/gemma-2-9b", (1, 1))]
    ):
        past = replace_values(spec, {"model.name_or_path": model})
        files = {"spec.yaml": render_spec(past), "estimate.json": json.dumps({"gpu": {"name": "A100-64"}})}
        run = create_run(tmp_path / "runs", f"old-{number + 1}", files)
        rows = [{"kind": "train", "step": n, "attempt": 1, "tokens_per_second": s} for n, s in enumerate(speeds)]
        run.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    durations = {row.name: row.duration for row in plan_spec(path).rows}
    big, small = durations["big:1x1"], durations["small:1x1"]
    assert big is not None
    assert small is not None
    # The first step warms up; the median of the others, of one of two GPUs: 1900 / (2 x 0.95).
    assert big.basis == "measured: 1,000 tokens/s a GPU in old-1"
    assert big.components["training"] == pytest.approx(100 * 16 * 212 / 1000)
    assert not small.measured


def test_a_row_by_name_gives_the_settings(make_spec: Callable[..., Path]):
    path = make_spec()
    overrides = find_row_overrides(path, ["resources.account=b"], "big/quick:1x4")
    spec = load_spec(path, ["resources.account=b", *overrides])
    asked = spec.resources
    assert (asked.partition, asked.qos, asked.gpus_per_node, asked.time) == ("big", "quick", 4, "00:30:00")
    assert (asked.account, asked.mem, spec.training.gradient_accumulation_steps) == ("b", "100G", 2)
    with pytest.raises(SpecError, match="no row '1'") as caught:
        find_row_overrides(path, [], "1")
    assert "big:1x1" in (caught.value.hint or "")


def test_this_machine_is_a_plan_too(make_spec: Callable[..., Path]):
    plan = plan_spec(make_spec(), ["resources.cluster=local", "resources.gpu=A100-64"])
    assert sorted(names(plan)) == ["local:1x1", "local:1x2"]
    assert {row.start_note for row in plan.rows} == {"at once"}


def test_submit_sends_the_very_script_that_was_asked_about(
    cluster: FakeCluster, make_spec: Callable[..., Path], tmp_path: Path
):
    path, asked = make_spec(), tmp_path / "asked"
    program = cluster.directory / "sbatch"
    program.write_text(
        f"#!/bin/sh\nwhile IFS= read -r line; do printf '%s\\n' \"$line\"; done < \"$2\" >> {asked}\n"
        f"echo '{ACCEPTED.format(start='2030-01-01T10:00:00')}' >&2\n"
    )  # fmt: skip
    program.chmod(0o755)
    scripts = [render_job(path, find_row_overrides(path, [], row.name)).plan.script for row in plan_spec(path).rows]
    assert len(scripts) == len(set(scripts)) > 6
    text = asked.read_text()
    assert sorted(f"#!/bin/bash{part}" for part in text.split("#!/bin/bash")[1:]) == sorted(scripts)


def test_the_command_that_is_printed_submits_what_was_planned(
    make_spec: Callable[..., Path], capsys: pytest.CaptureFixture[str]
):
    path = make_spec()
    named = path.rename("job of mine.yaml")
    settings = ["--set", "training.max_steps=7", "--set", "lora.target_modules=[q_proj, v_proj]"]
    app(["plan", str(named), *settings], standalone_mode=False)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: ")]
    typed = shlex.split(line.removeprefix("next: "))
    row = plan_spec(named, settings[1::2]).rows[0].name
    assert typed == ["lora-jobs", "submit", "job of mine.yaml", *settings, "--plan", row]
