"""Another value for each key of the spec between two attempts: free, on the user's word, or refused."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import pytest
from fault_ranks import KINDS, Stopped, copy_run, copy_stock, resume_stock

from lora_jobs.errors import LoraJobsError
from lora_jobs.workflows.resuming import plan_resume

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tiny_runs import RankServer

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]

LONG = os.environ.get("LORA_JOBS_FAULTS") == "long"
FREE, ASK, REFUSE = "goes on", "asks", "refused"
CASES: tuple[tuple[str, Any, str], ...] = (
    ("resources.time", "02:00:00", FREE),
    ("resources.cpus_per_task", 2, FREE),
    ("training.logging_steps", 5, FREE),
    ("training.save_steps", 3, FREE),
    ("training.max_steps", 9, ASK),
    ("training.gradient_accumulation_steps", 2, ASK),
    ("training.per_device_train_batch_size", 1, ASK),
    ("training.seed", 7, ASK),
    ("training.max_grad_norm", 0.5, ASK),
    ("data.max_length", 150, ASK),
    ("lora.r", 8, REFUSE),
    ("lora.lora_alpha", 16, REFUSE),
    ("lora.target_modules", ["q_proj"], REFUSE),
    ("lora.modules_to_save", ["embed_tokens"], REFUSE),
    ("model.dtype", "bfloat16", REFUSE),
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_JOBS_HOME", str(tmp_path / "runs"))
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.mark.parametrize(("key", "value", "expected"), CASES, ids=[case[0] for case in CASES])
def test_drift_of_a_key(
    key: str, value: Any, expected: str, stopped: Callable[[str], Stopped], home: Path, record: Callable[..., None]
) -> None:
    run = copy_run(stopped("plain").run, home / "plain_stopped-1")
    override = f"{key}={json.dumps(value)}"
    seen, why = FREE, ""
    try:
        plan_resume(run.id, [override])
    except LoraJobsError as error:
        why = error.message
        try:
            plan_resume(run.id, [override], allow_drift=[key])
            seen = ASK
        except LoraJobsError:
            seen = REFUSE
    record("drift", key, ours=seen, ours_detail=why)
    assert seen == expected, why
    assert key in why or expected == FREE


STOCK: tuple[tuple[str, dict[str, Any]], ...] = (
    ("training.gradient_accumulation_steps", {"accumulation": 2}),
    ("lora.lora_alpha", {"lora": {"lora_alpha": 64}}),
    ("lora.r", {"lora": {"r": 8}}),
    ("lora.target_modules", {"lora": {"target_modules": ["q_proj", "v_proj"]}}),
    ("data.train", {"rows": "text.jsonl"}),
)


@pytest.mark.skipif(not LONG, reason="part of the long form: make faults")
@pytest.mark.parametrize("kind", list(KINDS)[:2])
@pytest.mark.parametrize(("key", "change"), STOCK, ids=[case[0] for case in STOCK])
def test_what_stock_does_when_a_key_drifts(
    kind: str,
    key: str,
    change: dict[str, Any],
    stopped: Callable[[str], Stopped],
    server: RankServer,
    tmp_path: Path,
    record: Callable[..., None],
) -> None:
    """It notices another shape of a tensor, and nothing else."""
    found = stopped(kind)
    job = replace(copy_stock(found.stock, tmp_path / "stock"), **change)
    assert asdict(job) != asdict(found.stock)
    outcome = resume_stock(server, job, found.ranks, reference=found.stock_reference)
    record("drift", f"{key} (stock, {kind})", ours="", stock=outcome.verdict, stock_detail=outcome.detail)
    shape = key in ("lora.r", "lora.target_modules")
    assert outcome.verdict in (("crashed", "trained on wrong state") if shape else ("trained on wrong state",))
