"""Exports without torch: what is refused, what a pack holds, and that a card's texts mean nothing to Markdown."""

from __future__ import annotations

import json
import os
import struct
import tarfile
from pathlib import Path

import pytest
import yaml

from lora_jobs.checkpoints import commit_checkpoint, verify_checkpoint
from lora_jobs.errors import CheckpointError, LoraJobsError, RunError, SpecError
from lora_jobs.rendering.card import quote_block, quote_code
from lora_jobs.runs import Run, append_metrics, create_run
from lora_jobs.spec import load_spec, render_spec
from lora_jobs.workflows.exporting import merge_run, pack_run, place_whole

ROOT = Path(__file__).resolve().parents[3]
SPEC = load_spec(ROOT / "jobs/gemma2_9b_svg.yaml")


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_JOBS_HOME", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


@pytest.fixture
def run(runs: Path) -> Run:
    """A finished run; its adapter is one tensor."""
    files = {"spec.yaml": render_spec(SPEC), "estimate.json": '{"parameters": {"base": 9241705984}}'}
    made = create_run(runs, "gemma2_9b_svg-1", files)
    made.adapter.mkdir()
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    weights = struct.pack("<Q", len(header)) + header + b"\1" * 8
    (made.adapter / "adapter_model.safetensors").write_bytes(weights)
    for name, text in {"adapter_config.json": '{"r": 8}', "tokenizer.json": "{}", "README.md": "PEFT's"}.items():
        (made.adapter / name).write_text(text)
    (made.adapter / "tokenizer.json").chmod(0o600)
    metadata = {"versions": {"peft": "0.21.2"}, "data": {"examples": 3, "hash": "feed"}}
    commit_checkpoint(made.adapter, step=40, world_size=1, metadata=metadata)
    return made


def test_a_packed_folder_holds_the_adapter_a_card_and_the_spec_and_verifies(run: Run, tmp_path: Path) -> None:
    for phase, loss in (("before", 5.0), ("after", 2.0)):
        append_metrics(run, {"kind": "eval", "phase": phase, "step": 40, "eval_loss": loss})
    targets = {"bleu": {"expected": 18.0, "reached": 20.5, "met": True}}
    append_metrics(run, {"kind": "final", "metrics": {"eval_loss": 2.0, "bleu": 20.5}, "targets": targets})
    os.umask(os.umask(0o022))
    done = pack_run(None, tmp_path / "packed")
    folder = Path(done.path)
    names = [
        "MANIFEST.json",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "job.yaml",
        "tokenizer.json",
    ]
    assert sorted(path.name for path in folder.iterdir()) == names
    verdict = verify_checkpoint(folder)
    assert verdict.good, verdict.reason
    assert load_spec(folder / "job.yaml") == SPEC
    assert done.bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert (folder / "tokenizer.json").stat().st_mode == (folder / "README.md").stat().st_mode
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "peft",
        "base_model": "google/gemma-2-9b-it",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lora-jobs"],
    }
    for words in ("| eval loss | `5` | `2` |  |", "| bleu |  | `20.5` | `18` |", "`peft 0.21.2`", "learning_rate: "):
        assert words in body
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_packed_archive_has_one_folder_and_no_names_of_users(run: Run, tmp_path: Path) -> None:
    pack_run(run.id, tmp_path / "to" / "adapter.tar.gz")
    with tarfile.open(tmp_path / "to" / "adapter.tar.gz") as archive:
        entries = archive.getmembers()
        assert {entry.name.split("/")[0] for entry in entries} == {"adapter"}
        assert {(entry.uid, entry.uname) for entry in entries} == {(0, "")}
        archive.extractall(tmp_path / "out", filter="data")
    assert verify_checkpoint(tmp_path / "out" / "adapter").good
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["adapter.tar.gz"]


def check_refusal(error: type[LoraJobsError], code: int, words: str, target: Path, *, merge: bool = False) -> None:
    before = sorted(target.parent.iterdir())
    with pytest.raises(error, match=words) as caught:
        merge_run(None, target) if merge else pack_run(None, target)
    assert caught.value.exit_code == code
    assert sorted(target.parent.iterdir()) == before


@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_that_does_not_verify_is_never_exported(run: Run, tmp_path: Path, merge: bool) -> None:
    with (run.adapter / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\2")
    check_refusal(CheckpointError, 5, "does not verify, so it is not exported", tmp_path / "out", merge=merge)


def test_a_run_without_a_finished_adapter_is_refused(runs: Path, tmp_path: Path) -> None:
    create_run(runs, "gemma2_9b_svg-1", {"spec.yaml": render_spec(SPEC)})
    check_refusal(CheckpointError, 5, "has no finished adapter yet", tmp_path / "out")


@pytest.mark.parametrize("merge", [False, True])
def test_what_is_there_is_never_written_over(run: Run, tmp_path: Path, merge: bool) -> None:
    (tmp_path / "there").symlink_to(tmp_path / "nowhere")
    check_refusal(SpecError, 2, "exists already", tmp_path / "there", merge=merge)


def test_a_merge_that_does_not_fit_on_the_disk_is_refused_before_it_starts(run: Run, tmp_path: Path) -> None:
    run.estimate_path.write_text('{"parameters": {"base": 9000000000000000}}')
    check_refusal(RunError, 5, "free, this needs", tmp_path / "out", merge=True)


def test_an_unknown_dtype_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="wanted one of float32, bfloat16, float16"):
        merge_run(run.id, tmp_path / "out", dtype="int3")


def test_nothing_is_left_of_a_block_that_failed(tmp_path: Path) -> None:
    def fail() -> None:
        with place_whole(tmp_path / "out") as directory:
            (directory / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_texts_of_a_card_are_code(run: Run, tmp_path: Path) -> None:
    hostile = "a ``b`` | <script>x</script>\n```\n# not a title"
    sample = dict.fromkeys(("prompt", "expected", "without_adapter", "with_adapter"), hostile)
    append_metrics(run, {"kind": "sample", "step": 1, **sample})
    text = (Path(pack_run(run.id, tmp_path / "packed").path) / "README.md").read_text()
    lines = [line for line in text.splitlines() if "script" in line or "not a title" in line]
    assert len(lines) == 6
    assert all(line.startswith("    ") for line in lines)
    assert quote_code("a ``b`` c") == "```a ``b`` c```"
    assert quote_code("`a") == "`` `a ``"
    assert quote_block("a\n\nb") == "    a\n    \n    b"
