"""Hostile strings: what gets past the spec is rendered, the script is really run by bash, and nothing comes of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from lora_jobs.errors import LoraJobsError, SpecError
from lora_jobs.rendering import render_script
from lora_jobs.spec import JobSpec, parse_environment, parse_spec, render_spec

if TYPE_CHECKING:
    from collections.abc import Iterator

# Each would leave a file named CANARY, or write outside, if any part of it were run or followed.
PAYLOADS = {
    "newline": "x\ntouch CANARY #",
    "carriage_return": "x\r\ntouch CANARY\r\n",
    "substitution": "x$(touch CANARY)",
    "backticks": "x`touch CANARY`",
    "single_quote": "x'; touch CANARY; '",
    "double_quote": 'x"; touch CANARY; "',
    "semicolon": "x; touch CANARY",
    "and": "x && touch CANARY",
    "pipe": "x | touch CANARY",
    "redirect": "x > CANARY",
    "expansion": "${x:-$(touch CANARY)}",
    "arithmetic": "a[$(touch CANARY)]",
    "heredoc": "x <<EOF\n$(touch CANARY)\nEOF",
    "backslash": "x\\\ntouch CANARY",
    "parent": "../../CANARY",
    "option": "--wrap=touch CANARY",
    "directive": "x\n#SBATCH --wrap='touch CANARY'",
    "jinja": "{{ ''.__class__.__mro__ }}{% include '/etc/passwd' %}",
    "line_separator": "x\u2028touch CANARY",
    "next_line": "x\u0085touch CANARY",
    "null": "x\0touch CANARY",
    "escape": "x\x1b]0;CANARY\x07",
    "reordering": "x\u202etouch CANARY",
    "surrogate": "x\udcff",
}
FULL = """
name: tiny
model:
  name_or_path: org/tiny-model
  revision: main
  dtype: bfloat16
  attn_implementation: eager
  quantization: {load_in_4bit: true}
lora: {r: 8, target_modules: [q_proj], modules_to_save: [lm_head]}
data:
  {train: train, eval: test, dataset: org/drawings, dataset_config: small, dataset_revision: main, format: svg_caption,
   instruction: Say what this shows.}
training: {max_steps: 3, report_to: [tensorboard]}
deepspeed: {zero_stage: 2}
resources:
  {cluster: somewhere, partition: main, account: mine, qos: fast, reservation: ours, constraint: a&b, gpu: A100-64,
   mem: 1G, time: "00:30:00", mesh_shape: [[1, 1], [dp, fsdp]]}
sweep: {lora.r: [8, 16]}
"""
VALUES = parse_spec(FULL, source="full.yaml").to_values()


def _string_fields(values: dict[str, Any], path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every string in plain values."""
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in items:
        if isinstance(value, str):
            yield (*path, key)
        elif isinstance(value, dict | list):
            yield from _string_fields(value, (*path, key))


def _with(values: Any, path: tuple[Any, ...], text: str) -> Any:
    """A copy with the string at `path` replaced."""
    if not path:
        return text
    copied = dict(values) if isinstance(values, dict) else list(values)
    copied[path[0]] = _with(copied[path[0]], path[1:], text)
    return copied


FIELDS = list(_string_fields(VALUES))


def _environment(**changes: Any):
    values = {"scheduler": "slurm", "partitions": {"main": {"gpu": "A100-64"}}, **changes}
    return parse_environment(yaml.safe_dump(values), name="somewhere", file="somewhere.yaml")


def _render(spec: JobSpec, cluster, environment=None) -> str:
    return render_script(
        spec, environment or _environment(), run_id="tiny-1", run_directory=cluster.run, python=cluster.python
    )


def _list_tree(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def _run_and_find_traces(cluster, script: str) -> tuple[int, set[str]]:
    """The exit code, and whatever new file lies anywhere but where the script and the fakes write."""
    around = cluster.root.parent.parent
    before = _list_tree(around)
    ended = cluster.execute(script)
    own = {f"machine/node/{name}" for name in ("slurm_script", "calls", "calls.env", "calls.started")}
    return ended.code, _list_tree(around) - before - own


def test_every_string_of_the_spec_is_tried() -> None:
    """The spec above fills every field that takes a text; else a new field would go untested."""
    filled = set(FIELDS)
    assert {
        ("name",), ("model", "name_or_path"), ("model", "revision"), ("lora", "target_modules", 0),
        ("lora", "modules_to_save", 0), ("data", "train"), ("data", "eval"), ("data", "instruction"),
        ("data", "dataset"), ("data", "dataset_config"), ("data", "dataset_revision"),
        ("resources", "cluster"), ("resources", "partition"), ("resources", "account"), ("resources", "qos"),
        ("resources", "reservation"), ("resources", "constraint"), ("resources", "gpu"), ("resources", "mem"),
        ("resources", "time"),
    } <= filled  # fmt: skip
    left_out = [path for path, value in _leaves(VALUES) if value is None]
    assert [path for path in left_out if path[-1] not in {"max_steps", "num_train_epochs"}] == [
        ("model", "device_map"),
        ("lora", "lora_alpha"),
        ("data", "pad_to_multiple_of"),
        ("training", "eval_accumulation_steps"),
        ("training", "warmup_steps"),
        ("training", "eval_steps"),
        ("training", "early_stopping_patience"),
        ("training", "torch_empty_cache_steps"),
        ("resources", "array_task_throttle"),
    ], "these are numbers, or one fixed word; a text field that is empty here must be filled above"


def _leaves(values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


@pytest.mark.parametrize("path", FIELDS, ids=lambda path: ".".join(map(str, path)))
def test_a_hostile_string_in_the_spec_is_refused_or_changes_nothing_of_the_script(path, fake_cluster) -> None:
    harmless = _render(parse_spec(FULL, source="full.yaml"), fake_cluster)
    for payload in PAYLOADS.values():
        try:
            spec = parse_spec(yaml.safe_dump(_with(VALUES, path, payload)), source="hostile.yaml")
        except SpecError:
            continue
        assert _render(spec, fake_cluster) == harmless, "it reached the script: then it must be run by bash here"
        assert parse_spec(render_spec(spec), source="again.yaml") == spec


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
@pytest.mark.parametrize("name", ["partition", "account", "qos", "reservation", "constraint"])
def test_rendering_itself_refuses_what_cannot_stand_in_a_directive(name: str, payload: str, fake_cluster) -> None:
    """Past the spec's own checks (model_copy makes none): the second line of defence."""
    spec = parse_spec(FULL, source="full.yaml")
    hostile = spec.model_copy(update={"resources": spec.resources.model_copy(update={name: payload})})
    with pytest.raises(SpecError, match=f"resources.{name} can't stand in a batch script"):
        _render(hostile, fake_cluster)


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
@pytest.mark.parametrize("name", ["time", "mem"])
def test_times_and_sizes_are_written_from_their_numbers(name: str, payload: str, fake_cluster) -> None:
    spec = parse_spec(FULL, source="full.yaml")
    hostile = spec.model_copy(update={"resources": spec.resources.model_copy(update={name: payload})})
    with pytest.raises((SpecError, ValueError)):
        _render(hostile, fake_cluster)
    good = getattr(spec.resources, name)
    padded = spec.model_copy(update={"resources": spec.resources.model_copy(update={name: f" {good}\n"})})
    assert _render(padded, fake_cluster) == _render(spec, fake_cluster)


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
@pytest.mark.parametrize("place", ["value", "module", "python"])
def test_a_hostile_string_in_the_environment_file_never_runs(place: str, payload: str, fake_cluster) -> None:
    changes = {
        "value": {"environment": {"GREETING": payload}},
        "module": {"modules": [payload]},
        "python": {"python": payload},
    }[place]
    module = fake_cluster.binaries / "module"
    module.write_text("#!/bin/bash\n# A fake, for tests: every module loads.\n")
    module.chmod(0o755)
    try:
        environment = _environment(**changes)
        python = environment.python or fake_cluster.python
        script = render_script(
            parse_spec(FULL, source="full.yaml"),
            environment,
            run_id="tiny-1",
            run_directory=fake_cluster.run,
            python=python,
        )
    except LoraJobsError:
        return
    code, traces = _run_and_find_traces(fake_cluster, script)
    assert traces == set()
    assert code == (127 if place == "python" else 0), "with such a Python there is no attempt"


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_a_hostile_run_directory_is_refused_or_only_a_name(payload: str, build_fake_cluster) -> None:
    try:
        cluster = build_fake_cluster(run=payload)
    except (OSError, ValueError):
        return  # no such directory can be made
    try:
        script = _render(parse_spec(FULL, source="full.yaml"), cluster)
    except SpecError as error:
        assert "run directory can't stand in a batch script" in error.message  # noqa: PT017
        return
    code, traces = _run_and_find_traces(cluster, script)
    assert (code, traces) == (0, set())
    srun = next(line for line in cluster.calls.read_text().splitlines() if line.startswith("srun"))
    assert f"[{cluster.run}/submitit]" in srun
    assert f"[--output={str(cluster.run).replace('%', '%%')}/logs/attempt-1.out]" in srun


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_a_hostile_run_id_is_refused(payload: str, fake_cluster) -> None:
    with pytest.raises(SpecError, match="run id can't stand"):
        render_script(
            parse_spec(FULL, source="full.yaml"),
            _environment(),
            run_id=payload,
            run_directory=fake_cluster.run,
            python=fake_cluster.python,
        )


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_a_hostile_variable_name_is_refused(payload: str, fake_cluster) -> None:
    environment = _environment().model_copy(update={"environment": {payload: "1"}})
    with pytest.raises(SpecError, match="is not a variable name"):
        _render(parse_spec(FULL, source="full.yaml"), fake_cluster, environment)


@pytest.mark.parametrize(
    "folder", ["relative/run", "/runs/../etc", "/runs/%j/tiny-1", "/runs/%a", '/runs/a"b', "/runs/a\\b", "/runs/a\tb"]
)
def test_a_run_directory_that_sbatch_srun_or_submitit_would_misread_is_refused(folder: str) -> None:
    with pytest.raises(SpecError, match="run directory can't stand in a batch script"):
        render_script(
            parse_spec(FULL, source="full.yaml"), _environment(), run_id="t-1", run_directory=Path(folder), python="p"
        )
