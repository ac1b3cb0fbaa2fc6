"""What `check` promises of a change is what `check --set` then says: every shipped job, several GPUs."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from lora_jobs.cli.show_check import format_settings
from lora_jobs.workflows.checking import CheckReport, check_job

ROOT = Path(__file__).resolve().parents[3]
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))
KNOWN = {"smollm2_135m_svg": "smollm2-135m", "tiny_gemma2": "gemma-2-2b"}
"""Models that stand for those that `make demo` brings."""

GPUS = ("2080Ti", "RTX4090", "RTX5090", "A100-80")
DEMANDING = (
    "training.per_device_train_batch_size=16",
    "training.per_device_eval_batch_size=16",
    "data.max_length=2048",
)
"""What makes a small model want more than a small card has."""


def check(job: Path, *overrides: str) -> CheckReport:
    model = KNOWN.get(job.stem)
    named = (f"model.name_or_path={model}",) if model else ()
    return check_job(job, [*named, *overrides])


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_a_suggestion_gives_exactly_the_promised_peak(job: Path, gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    asked = (*DEMANDING, f"resources.gpu={gpu}")
    verdict = check(job, *asked).verdict
    assert verdict.fits or verdict.suggestions
    for change in verdict.suggestions:
        typed = [word for word in shlex.split(format_settings(change.set)) if word != "--set"]
        again = check(job, *asked, *typed).verdict
        assert (again.estimate.peak_bytes, again.word) == (change.peak_bytes, change.verdict), typed
