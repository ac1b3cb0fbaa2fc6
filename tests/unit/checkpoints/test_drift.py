"""What changed since the checkpoint, and what that means."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from small_checkpoints import write_checkpoint

from lora_jobs.checkpoints import (
    ALLOWED_FILE,
    Drift,
    commit_checkpoint,
    find_drift,
    find_run_drift,
    list_allowed,
    record_inputs,
    refuse_drift,
)
from lora_jobs.checkpoints.drift import _RULES, find_rule
from lora_jobs.checkpoints.inputs import WHOLE_BYTES, fingerprint_inputs, sample_file
from lora_jobs.errors import RunError
from lora_jobs.runs import Run, create_run
from lora_jobs.spec import JobSpec, load_spec, parse_spec

SPEC = """
name: tiny
model: {name_or_path: org/tiny-model, quantization: {load_in_4bit: true}}
lora: {r: 8, lora_alpha: 16}
data: {train: train.jsonl}
training: {max_steps: 30}
deepspeed: {zero_stage: 2}
resources: {nodes: 2, gpus_per_node: 1}
"""


def _spec(*overrides: str) -> JobSpec:
    return parse_spec(SPEC, source="tiny.yaml", overrides=overrides)


def _found(*overrides: str) -> list[tuple[str, object, object, str]]:
    return [(drift.key, drift.stored, drift.present, drift.kind) for drift in find_drift(_spec(), _spec(*overrides))]


def test_the_same_spec_has_no_drift() -> None:
    assert find_drift(_spec(), _spec()) == []


@pytest.mark.parametrize(
    ("override", "stored", "present", "kind"),
    [
        ("model.name_or_path=org/other", "org/tiny-model", "org/other", "forbidden"),
        ("model.revision=main", None, "main", "forbidden"),
        ("model.quantization.load_in_4bit=true", None, None, None),
        ("model.quantization.bnb_4bit_quant_type=fp4", "nf4", "fp4", "forbidden"),
        ("model.attn_implementation=eager", None, "eager", "allowed_with_flag"),
        ("lora.r=16", 8, 16, "forbidden"),
        ("lora.lora_alpha=32", 16.0, 32.0, "forbidden"),
        ("lora.lora_dropout=0.1", 0.0, 0.1, "allowed_with_flag"),
        ("lora.modules_to_save=[lm_head]", [], ["lm_head"], "forbidden"),
        ("data.train=other.jsonl", "train.jsonl", "other.jsonl", "allowed_with_flag"),
        ("data.eval=held_out.jsonl", None, "held_out.jsonl", "free"),
        ("training.max_steps=60", 30, 60, "allowed_with_flag"),
        ("training.learning_rate=1e-3", 2e-4, 1e-3, "allowed_with_flag"),
        ("training.gradient_accumulation_steps=4", 1, 4, "allowed_with_flag"),
        ("training.optim=adamw_torch", "adamw_torch_fused", "adamw_torch", "forbidden"),
        ("training.bf16=true", False, True, "forbidden"),
        ("training.save_steps=5", 100, 5, "free"),
        ("deepspeed.zero_stage=1", 2, 1, "forbidden"),
        ("deepspeed.reduce_bucket_size=1000", "auto", 1000, "free"),
        ("resources.time=24:00:00", "01:00:00", "24:00:00", "free"),
        ("resources.nodes=4", 2, 4, "forbidden"),
        ("resume.max_attempts=3", 20, 3, "free"),
        ("name=other", "tiny", "other", "free"),
    ],
)
def test_one_change(override: str, stored: object, present: object, kind: str | None) -> None:
    key = override.partition("=")[0]
    assert _found(override) == ([] if kind is None else [(key, stored, present, kind)])


def test_a_section_that_one_side_leaves_out_is_one_drift() -> None:
    stored, present = _spec(), _spec("deepspeed=null")
    assert [(drift.key, drift.present, drift.kind) for drift in find_drift(stored, present)] == [
        ("deepspeed", None, "forbidden")
    ]
    assert [(drift.key, drift.stored, drift.kind) for drift in find_drift(present, stored)] == [
        ("deepspeed", None, "forbidden")
    ]


def test_the_same_number_of_processes_may_be_arranged_anew() -> None:
    assert _found("resources.nodes=1", "resources.gpus_per_node=2") == [
        ("resources.nodes", 2, 1, "free"),
        ("resources.gpus_per_node", 1, 2, "free"),
    ]


def test_without_deepspeed_another_number_of_processes_needs_the_users_word() -> None:
    stored, present = _spec("deepspeed=null"), _spec("deepspeed=null", "resources.nodes=1")
    assert [drift.kind for drift in find_drift(stored, present)] == ["allowed_with_flag"]


def test_alpha_left_out_is_alpha_equal_to_r() -> None:
    assert find_drift(_spec("lora.lora_alpha=8"), _spec("lora.lora_alpha=null")) == []


def test_a_drift_says_why_and_goes_into_json() -> None:
    (drift,) = find_drift(_spec(), _spec("lora.r=16"))
    why = "the checkpoint's weights belong to the stored value"
    assert drift == Drift("lora.r", 8, 16, "forbidden", why)
    assert drift.to_json() == {"key": "lora.r", "stored": 8, "present": 16, "kind": "forbidden", "why": why}


def _keys(values: dict, prefix: str = "") -> set[str]:
    found = set()
    for name, value in values.items():
        found.add(prefix + name)
        if isinstance(value, dict):
            found |= _keys(value, f"{prefix}{name}.")
    return found


def test_every_key_of_a_spec_has_a_row_and_every_row_a_key() -> None:
    known = _keys(_spec().to_values())
    assert set(_RULES) - known == set()
    assert {key for key in known if key.partition(".")[0] not in _RULES} == set()


def test_a_key_that_no_row_knows_needs_the_users_word() -> None:
    assert find_rule("future.key")[0] == "allowed_with_flag"


DATA_SPEC = "name: tiny\nmodel: {name_or_path: org/m}\nlora: {r: 8}\ndata: {train: %s}\ntraining: {max_steps: 30}\n"


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Run, Path]:
    """A run whose first attempt committed checkpoint-4."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    run = create_run(tmp_path / "runs", "tiny-1", {"spec.yaml": DATA_SPEC % rows})
    record_inputs(run, 1, load_spec(run.spec_path))
    checkpoint = run.checkpoints / "checkpoint-4"
    write_checkpoint(checkpoint, step=4)
    commit_checkpoint(checkpoint, step=4, world_size=1, metadata={"attempt": 1})
    return run, checkpoint


def test_the_checkpoints_own_spec_is_compared_not_the_runs_newest(trained: tuple[Run, Path]) -> None:
    run, checkpoint = trained
    run.spec_path.write_text(run.spec_path.read_text().replace("max_steps: 30", "max_steps: 60"))
    (drift,) = find_run_drift(run, checkpoint, load_spec(run.spec_path))
    assert (drift.key, drift.stored, drift.present) == ("training.max_steps", 30, 60)
    with pytest.raises(RunError, match=r"this changes how the run trains on: training.max_steps: was 30, now 60"):
        refuse_drift([drift], list_allowed(run, [drift], ()))
    refuse_drift([drift], list_allowed(run, [drift], ["training.max_steps"]))


def test_drift_that_was_allowed_stays_allowed_for_that_value_only(trained: tuple[Run, Path]) -> None:
    run, checkpoint = trained
    (run.directory / ALLOWED_FILE).write_text('{"training.max_steps": 60}')
    for steps, allowed in ((60, {"training.max_steps": 60}), (70, {})):
        run.spec_path.write_text(re.sub("max_steps: [0-9]+", f"max_steps: {steps}", run.spec_path.read_text()))
        drift = find_run_drift(run, checkpoint, load_spec(run.spec_path))
        assert list_allowed(run, drift, ()) == allowed


def test_the_same_file_name_with_other_rows_is_drift(trained: tuple[Run, Path]) -> None:
    run, checkpoint = trained
    spec = load_spec(run.spec_path)
    assert find_run_drift(run, checkpoint, spec) == []
    Path(spec.data.train).write_text('{"prompt": "a", "completion": "c"}\n')
    (drift,) = find_run_drift(run, checkpoint, spec)
    assert (drift.key, drift.kind) == ("data.train", "allowed_with_flag")
    with pytest.raises(RunError, match="this changes how the run trains on"):
        refuse_drift([drift], {})


def test_another_number_of_processes_names_the_choices() -> None:
    drift = find_drift(_spec(), _spec("resources.nodes=4"))
    with pytest.raises(RunError, match=r"another number of processes: resources\.nodes: ") as raised:
        refuse_drift(drift, {})
    assert "`--gpus N` converts the checkpoint" in str(raised.value.hint)


@pytest.fixture
def modelled(tmp_path: Path) -> tuple[Run, Path, Path]:
    """As `trained`, with the base model in a directory: (run, checkpoint, model)."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "gemma2", "transformers_version": "5.0"}')
    (model / "tokenizer.json").write_text("{}")
    (model / "model.safetensors").write_bytes(bytes(1000))
    run = create_run(
        tmp_path / "runs", "tiny-1", {"spec.yaml": (DATA_SPEC % "rows.jsonl").replace("org/m", f"{model}")}
    )
    record_inputs(run, 1, load_spec(run.spec_path))
    checkpoint = run.checkpoints / "checkpoint-4"
    write_checkpoint(checkpoint, step=4)
    commit_checkpoint(checkpoint, step=4, world_size=1, metadata={"attempt": 1})
    return run, checkpoint, model


@pytest.mark.parametrize(
    ("name", "content", "key"),
    [
        ("config.json", '{"model_type": "gemma3"}', "model.config"),
        ("config.json", "no JSON", "model.config"),
        ("tokenizer.json", '{"version": "1.0"}', "model.tokenizer"),
        ("chat_template.jinja", "{{ messages }}", "model.tokenizer"),
        ("model.safetensors", "x" * 1000, "model.weights"),
    ],
)
def test_the_same_path_with_another_base_model_is_refused(
    modelled: tuple[Run, Path, Path], name: str, content: str, key: str
) -> None:
    run, checkpoint, model = modelled
    spec = load_spec(run.spec_path)
    assert find_run_drift(run, checkpoint, spec) == []
    (model / name).write_text(content)
    (drift,) = find_run_drift(run, checkpoint, spec)
    assert (drift.key, drift.kind) == (key, "forbidden")
    with pytest.raises(RunError, match=f"does not match the spec: {key}"):
        refuse_drift([drift], {key: drift.present})


def test_another_version_of_transformers_is_not_another_model(modelled: tuple[Run, Path, Path]) -> None:
    run, checkpoint, model = modelled
    (model / "config.json").write_text('{"transformers_version": "5.1", "model_type": "gemma2"}')
    assert find_run_drift(run, checkpoint, load_spec(run.spec_path)) == []


def test_a_model_of_the_hub_is_known_by_its_snapshot(
    modelled: tuple[Run, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, model = modelled
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    spec = parse_spec(DATA_SPEC % "rows.jsonl", source="x.yaml")
    assert fingerprint_inputs(spec) == {}
    folder = tmp_path / "hub" / "models--org--m"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    shutil.copytree(model, folder / "snapshots" / "abc")
    assert set(fingerprint_inputs(spec)) == {"model.weights", "model.config", "model.tokenizer"}


def test_a_large_file_is_told_by_its_first_and_last_parts_too(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(WHOLE_BYTES + 1)
    before = sample_file(path)
    for place in (0, WHOLE_BYTES):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        assert sample_file(path) != before
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"\0")
    assert sample_file(path) == before
