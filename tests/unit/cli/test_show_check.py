"""The screen of `check`: one screen, the verdict at the top, the 32 GB card, nothing beyond its width."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from lora_jobs.cli.show_check import show_check
from lora_jobs.sizing.margins import MARGINS
from lora_jobs.workflows.checking import Exact, check_job

ROOT = Path(__file__).resolve().parents[3]
SPEC = ROOT / "jobs/gemma2_9b_svg.yaml"

CASES: dict[str, tuple[list[str], list[str]]] = {
    "as written": ([], ["FITS: ", "of 63.4 GiB usable on each A100-64", "32 GB (RTX5090): does not fit"]),
    "stock loss": (
        ["training.trainer=transformers", "training.per_device_eval_batch_size=8"],
        ["DOES NOT FIT: ", "dies before step 1, in the first evaluation", "256,000 tokens", "32 GB (RTX5090)"],
    ),
    "one gpu": (["resources.gpus_per_node=1"], ["TIGHT: ", "to be sure (", "  or --set "]),
    "attention left open": (
        ["model.attn_implementation=null", "training.trainer=transformers", "training.per_device_eval_batch_size=8"],
        ["attention: eager by default", "DOES NOT FIT: "],
    ),
    "workstation": (["resources.gpu=RTX5090"], ["DOES NOT FIT: ", "dies before step 1", "fits on 80 GB (A100-80)"]),
}


@pytest.mark.parametrize("case", CASES)
def test_one_screen_says_it_all(case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    overrides, words = CASES[case]
    monkeypatch.chdir(ROOT)
    report = check_job(SPEC, overrides)
    show_check(report, f"lora-jobs check {SPEC.name}")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert [line for line in lines if len(line) > 100 and "--set" not in line] == []
    text = "\n".join(lines)
    assert [word for word in words if word not in text] == []
    assert "\x1b" not in text
    beside = [name.replace("_", " ") for name in MARGINS if name in report.verdict.estimate.components]
    assert len(beside) == 3 + (report.spec.resources.world_size > 1)
    assert [name for name in beside if f"\n  {name} " not in text] == []
    if not report.fits:
        first = report.verdict.suggestions[0]
        assert first.fits
        assert f"lora-jobs check {SPEC.name} --set " in text


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["model.attn_implementation=null"], "trainable (22.19%); attention: eager by default"),
        (["model.attn_implementation=eager"], "trainable (22.19%)"),
        (
            ["model.attn_implementation=sdpa", "model.name_or_path=gemma-3-1b"],
            "attention: sdpa, its flash and memory-efficient kernels",
        ),
    ],
)
def test_the_attention_that_the_spec_leaves_open_is_said(
    overrides: list[str], line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    show_check(check_job(SPEC, overrides), "lora-jobs check")
    second = capsys.readouterr().out.splitlines()[1:3]
    assert " ".join(part.strip() for part in second).strip().endswith(line)


def test_a_trace_begins_after_loading(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """QLoRA on short rows needs most while it is loaded: that counts beside the trace, and is not compared with it."""
    monkeypatch.chdir(ROOT)
    short = ("model.quantization.load_in_4bit=true", "lora.modules_to_save=[]", "data.max_length=256")
    report = check_job(SPEC, [*short, "resources.gpu=RTX4090"])
    estimate = report.verdict.estimate
    step = estimate.step_peak_bytes
    assert (estimate.binding.name, step < estimate.allocated_peak_bytes) == ("model_load", True)
    traced = replace(report, exact=Exact(step, {"loss_backward": step}, {}, {}))
    assert (traced.peak_bytes, traced.word) == (report.peak_bytes, report.word)
    show_check(traced, "lora-jobs check")
    text = capsys.readouterr().out
    assert "peak of a process, before step 1 (loading the model)" in text
    assert "the estimate says " in text
    assert "(+0.00%)" in text
