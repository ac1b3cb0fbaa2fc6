"""Another value for each key of the spec between two attempts: free, on the user's word, or refused."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import pytest
from fault_ranks import KINDS, Stopped, copy_run, copy_stock, resume_stock

from lora_jobs.checkpoints.drift import _RULES
from lora_jobs.errors import LoraJobsError
from lora_jobs.spec import load_spec, override_spec, render_spec
from lora_jobs.training.attempt import choose_start
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
    ("training.learning_rate", 0.005, ASK),
    ("lora.lora_dropout", 0.0, ASK),
    ("training.gradient_accumulation_steps", 2, ASK),
    ("training.per_device_train_batch_size", 1, ASK),
    ("training.seed", 7, ASK),
    ("training.max_grad_norm", 0.5, ASK),
    ("data.max_length", 150, ASK),
    ("lora.r", 8, REFUSE),
    ("lora.lora_alpha", 16, REFUSE),
    ("lora.target_modules", ["q_proj"], REFUSE),
    ("lora.modules_to_save", ["embed_tokens"], REFUSE),
    ("lora.use_rslora", True, REFUSE),
    ("training.optim", "adamw_torch_fused", REFUSE),
    ("training.weight_decay", 0.1, REFUSE),
    ("model.dtype", "bfloat16", REFUSE),
    ("model.revision", "v2", REFUSE),
    ("resources.gpus_per_node", 2, ASK),
    ("name", "other", FREE),
    ("model.name_or_path", "org/other", REFUSE),
    ("model.attn_implementation", "eager", ASK),
    ("model.device_map", "auto", FREE),
    ("model.trust_remote_code", True, ASK),
    ("data.train", "OTHER", ASK),
    ("data.eval", "OTHER", FREE),
    ("training.lr_scheduler_type", "constant", ASK),
    ("training.adam_beta1", 0.8, REFUSE),
    ("training.adam_beta2", 0.9, REFUSE),
    ("training.adam_epsilon", 1e-6, REFUSE),
    ("training.bf16", True, REFUSE),
    ("training.fp16", True, REFUSE),
    ("training.per_device_eval_batch_size", 1, FREE),
    ("training.eval_accumulation_steps", 2, FREE),
    ("training.activation_checkpointing", True, FREE),
    ("training.dataloader_num_workers", 1, FREE),
    ("training.dataloader_pin_memory", False, FREE),
    ("training.torch_empty_cache_steps", 5, FREE),
    ("training.report_to", [], FREE),
    ("training.final_metrics", ["bleu"], FREE),
    ("training.final_examples", 3, FREE),
    ("training.max_new_tokens", 5, FREE),
    ("training.targets", {"eval_loss": 1.0}, FREE),
    ("deepspeed", {"zero_stage": 2}, REFUSE),
    ("deepspeed.zero_stage", 1, REFUSE),
    ("deepspeed.torch_autocast", True, REFUSE),
    ("deepspeed.offload_optimizer", True, ASK),
    ("deepspeed.allgather_bucket_size", 1000000, FREE),
    ("deepspeed.reduce_bucket_size", 1000000, FREE),
    ("deepspeed.overlap_comm", True, FREE),
    ("deepspeed.contiguous_gradients", False, FREE),
    ("resume.max_attempts", 3, FREE),
)
# What the stored spec has to say before this key can be changed alone.
STORED: dict[str, tuple[str, ...]] = {
    "model.trust_remote_code": (f"model.revision={'a' * 40}",),
    "training.final_metrics": ("data.eval=OTHER",),
    "training.targets": ("data.eval=OTHER",),
    "deepspeed.torch_autocast": ("training.bf16=true",),
}
# No run's spec can differ in these: a run of a sweep has its own values, and the other key has one value only.
ALIKE = {"sweep", "model.low_cpu_mem_usage"}


def test_every_rule_has_a_case() -> None:
    cases = {case[0] for case in CASES}
    assert set(_RULES) - cases - {key.partition(".")[0] for key in cases} == ALIKE


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_JOBS_HOME", str(tmp_path / "runs"))
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.mark.parametrize(("key", "value", "expected"), CASES, ids=[case[0] for case in CASES])
def test_drift_of_a_key(
    key: str,
    value: Any,
    expected: str,
    stopped: Callable[[str], Stopped],
    tiny: Path,
    home: Path,
    record: Callable[..., None],
) -> None:
    run = copy_run(stopped("zero2" if key.startswith("deepspeed.") else "plain").run, home / "stopped-1")
    other = str(tiny / "data" / "tiny" / "eval.jsonl")
    for path in [run.spec_path, *run.directory.glob("attempt-*.spec.yaml")]:
        before = [each.replace("OTHER", other) for each in STORED.get(key, ())]
        path.write_text(render_spec(override_spec(load_spec(path), before)))
    override = f"{key}={json.dumps(other if value == 'OTHER' else value)}"
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


def change_data(tiny: Path) -> None:
    path = tiny / "data" / "tiny" / "train.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))


def change_weights(tiny: Path) -> None:
    """One value in the middle, as another base model has."""
    path = tiny / "models" / "tiny_gemma2" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_config(tiny: Path) -> None:
    path = tiny / "models" / "tiny_gemma2" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_theta": 1.0}))


def change_tokenizer(tiny: Path) -> None:
    path = tiny / "models" / "tiny_gemma2" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": "{{ messages }}"}))


SAME_NAME: tuple[tuple[str, Callable[[Path], None], str], ...] = (
    ("data.train", change_data, ASK),
    ("model.weights", change_weights, REFUSE),
    ("model.config", change_config, REFUSE),
    ("model.tokenizer", change_tokenizer, REFUSE),
)


@pytest.mark.parametrize(("key", "change", "expected"), SAME_NAME, ids=[case[0] for case in SAME_NAME])
def test_the_same_name_with_another_content(
    key: str,
    change: Callable[[Path], None],
    expected: str,
    stopped: Callable[[str], Stopped],
    tiny: Path,
    tmp_path: Path,
    record: Callable[..., None],
) -> None:
    """What the batch script finds before any rank is started; the spec's file names are those of the copy."""
    run = copy_run(stopped("plain").run, tmp_path / "plain_stopped-1")
    shutil.copytree(tiny, tmp_path / "tiny")
    for path in [run.spec_path, *run.directory.glob("attempt-*.spec.yaml")]:
        path.write_text(path.read_text().replace(str(tiny), str(tmp_path / "tiny")))
    assert choose_start(run, world_size=1).step == 4
    change(tmp_path / "tiny")
    seen, why = FREE, ""
    try:
        choose_start(run, world_size=1)
    except LoraJobsError as error:
        seen, why = (REFUSE if "does not match the spec" in error.message else ASK), error.message
    record("drift", f"{key}, another content under the same name", ours=seen, ours_detail=why)
    assert seen == expected, why
    assert key in why


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
