"""The shipped specs on random models of the same architectures, tiny ones, through a real Slurm to an adapter."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from slurm_cluster import ACCOUNT

from lora_jobs.checkpoints import verify_checkpoint
from lora_jobs.checkpoints.tensors import read_header
from lora_jobs.runs import load_metrics
from lora_jobs.sizing import find_shape
from lora_jobs.spec import load_spec
from lora_jobs.workflows.observing import observe_runs
from lora_jobs.workflows.submitting import submit_job

if TYPE_CHECKING:
    from slurm_cluster import SlurmCluster

    from lora_jobs.runs import Run

pytestmark = [pytest.mark.slurm, pytest.mark.train]

JOBS = Path(__file__).parents[2] / "jobs"
SECONDS = 600.0
SVG = ("train", "eval")
# The spec, the tiny model, the data's files, and what is smaller: sizes, never kinds.
CASES = {
    "gemma2_9b_svg": ("tiny_gemma2", SVG, (
        "lora.r=8", "lora.lora_alpha=16", "training.gradient_accumulation_steps=2", "training.num_train_epochs=null",
        "training.eval_steps=1", "training.save_steps=1", "training.dataloader_num_workers=0",
        "deepspeed.allgather_bucket_size=100000", "deepspeed.reduce_bucket_size=100000",
    )),
    "gemma3_1b": ("tiny_gemma3", SVG, ("training.num_train_epochs=null", "training.eval_steps=1",
                                       "training.save_steps=1")),
    "llama32_3b_climate_qlora": ("tiny_llama", ("text", "text"), (
        "training.gradient_accumulation_steps=2", "training.num_train_epochs=null",
    )),
    "gemma3_270m": ("tiny_gemma3", SVG, ("training.num_train_epochs=null", "training.eval_steps=2",
                                        "training.gradient_accumulation_steps=2", "training.save_steps=2")),
    "gemma3_4b": ("tiny_gemma3_sees", SVG, (
        "training.per_device_train_batch_size=2", "training.num_train_epochs=null", "training.eval_steps=1",
        "training.save_steps=1",
    )),
    "smollm2_135m_svg": ("tiny_llama", SVG, ()),
}  # fmt: skip


def submit_small(name: str, tiny_files: Path) -> Run:
    model, (train, held_out), smaller = CASES[name]
    overrides = [
        f"model.name_or_path={json.dumps(str(tiny_files / 'models' / model))}",
        f"data.train={json.dumps(str(tiny_files / f'data/tiny/{train}.jsonl'))}",
        f"data.eval={json.dumps(str(tiny_files / f'data/tiny/{held_out}.jsonl'))}",
        f"resources.cluster={json.dumps(str(tiny_files / 'test_cluster.yaml'))}",
        f"resources.account={ACCOUNT}",
        "resources.partition=boost_usr_prod",
        "resources.gpu=null",
        "resources.mem=null",
        "resources.cpus_per_task=1",
        "resources.time=00:20:00",
        "training.max_steps=2",
        "lora.r=4",
        *smaller,
    ]
    report = submit_job(JOBS / f"{name}.yaml", overrides, cluster="slurm")
    assert report.run is not None
    return report.run


def test_every_spec_has_its_own_architecture(tiny_files: Path):
    assert CASES.keys() == {path.stem for path in JOBS.glob("*.yaml")} - {"tiny_gemma2"}
    for name, (model, *_) in CASES.items():
        known = load_spec(JOBS / f"{name}.yaml").model.name_or_path
        real = find_shape("smollm2-135m" if known == "models/smollm2_135m_instruct" else known)
        tiny = find_shape(str(tiny_files / "models" / model))
        assert (tiny.model_type, tiny.vision is None) == (real.model_type, real.vision is None), name
        assert tiny.tie_word_embeddings == real.tie_word_embeddings, name


def test_the_shipped_specs_to_their_adapters(
    slurm: SlurmCluster, tiny_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_JOBS_HOME", str(tmp_path / "runs"))
    runs = {name: submit_small(name, tiny_files) for name in CASES}
    deadline = time.monotonic() + SECONDS
    while any(status.active for status in observe_runs(list(runs.values())).runs):
        assert time.monotonic() < deadline, observe_runs(list(runs.values()))
        time.sleep(1)
    for name, run in runs.items():
        logs = "\n".join(path.read_text()[-2000:] for path in sorted(run.logs.iterdir()))
        assert run.adapter.is_dir(), f"{name}\n{logs}"
        assert verify_checkpoint(run.adapter).good
        rows = load_metrics(run)
        assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2], name
        before, *_, after = [row["eval_loss"] for row in rows if row["kind"] == "eval"]
        assert after < before, name
    adapted, _ = read_header(runs["gemma3_4b"].adapter / "adapter_model.safetensors")
    assert len(adapted) == 3 * 7 * 2  # layers, projections, A and B: the text model's, none of the vision tower's
    assert {key.partition(".layers.")[0] for key in adapted} == {"base_model.model.model.language_model"}
