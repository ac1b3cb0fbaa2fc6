"""`init`: what it writes passes `check`, for every model of the table; wrong answers leave no file."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_jobs.errors import SpecError
from lora_jobs.rendering.starter import CHOSEN, change_value, quote_scalar
from lora_jobs.sizing.models import MODELS
from lora_jobs.spec import load_spec, parse_spec
from lora_jobs.workflows.checking import check_job
from lora_jobs.workflows.starting import Answers, init_spec


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("LORA_JOBS_ENVS", "LORA_JOBS_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("model", [shape.name for shape in MODELS])
def test_the_spec_of_every_model_fits_and_names_a_model_that_loads(model: str, here: Path) -> None:
    started = init_spec(Path("job"), Answers(model=model, cluster="leonardo", account="me", gpus=4))
    report = check_job(here / "job.yaml")
    assert report.fits, started.changed
    spec = load_spec(here / "job.yaml")
    assert "/" in spec.model.name_or_path
    assert report.verdict.to_json()["parameters"]["base"] > 0
    for key in started.changed:
        assert CHOSEN in next(
            line for line in (here / "job.yaml").read_text().splitlines() if key.split(".")[1] in line
        )


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ('{"prompt": "a", "completion": "b", "id": 1}', "prompt_completion"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', "chat"),
        ('{"text": "a"}', "text"),
        ('{"svg": "<svg/>", "caption": "b"}', "svg_caption"),
    ],
)
def test_the_format_is_that_of_the_data(row: str, kind: str, here: Path) -> None:
    (here / "rows.jsonl").write_text(f"{row}\n")
    init_spec(Path("job"), Answers(train="rows.jsonl"))
    spec = load_spec(here / "job.yaml")
    assert (spec.data.format, spec.data.eval, spec.training.eval_steps) == (kind, None, None)


def test_every_answer_stands_in_the_spec(here: Path) -> None:
    answers = Answers(
        model="google/gemma-2-2b-it", train="a b.jsonl", held_out="null", format="chat", cluster="leonardo",
        partition="boost_usr_prod", account="IscrC_x", gpus=2, gpu="H100-80", time="1-00:00:00",
    )  # fmt: skip
    started = init_spec(Path("on"), answers, here / "specs" / "mine.yaml")
    spec = load_spec(started.path)
    assert spec.name == "on"
    assert (spec.model.name_or_path, spec.data.train, spec.data.eval) == ("google/gemma-2-2b-it", "a b.jsonl", "null")
    asked = spec.resources
    assert (asked.cluster, asked.partition, asked.account) == ("leonardo", "boost_usr_prod", "IscrC_x")
    assert (asked.gpus_per_node, asked.gpu, asked.time) == (2, "H100-80", "1-00:00:00")
    assert spec.deepspeed is not None


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (Answers(model="google/gemma-2-9c-it"), "did you mean google/gemma-2-9b-it"),
        (Answers(cluster="leonard"), "did you mean leonardo"),
        (Answers(format="xml"), "wanted one of prompt_completion"),
        (Answers(train="odd.jsonl"), "its first row has the keys question, wanted"),
        (Answers(time="soon"), "1 problem"),
        (Answers(cluster="leonardo", partition="boost"), "can't run as it is written"),
        (Answers(cluster="leonardo", gpus=5), "can't run as it is written"),
        (Answers(gpu="A100-65"), "A100-65"),
    ],
)
def test_a_wrong_answer_is_an_error_and_no_file(answers: Answers, words: str, here: Path) -> None:
    (here / "odd.jsonl").write_text('{"question": 1}\n')
    with pytest.raises(SpecError, match=words):
        init_spec(Path("job"), answers)
    assert [path.name for path in here.iterdir()] == ["odd.jsonl"]


def test_a_file_that_is_there_stays(here: Path) -> None:
    (here / "job.yaml").write_text("mine")
    with pytest.raises(SpecError, match="exists already"):
        init_spec(Path("job"), Answers())
    with pytest.raises(SpecError, match="is no name for a job"):
        init_spec(Path("a b"), Answers())
    assert (here / "job.yaml").read_text() == "mine"


def test_a_value_is_changed_where_it_stands_or_added() -> None:
    text = "a:\n  x: 1   # why\n  # y: 2\n\nb:\n  z: 3\n"
    assert change_value(text, "a.x", 5) == f"a:\n  x: 5   {CHOSEN}\n  # y: 2\n\nb:\n  z: 3\n"
    assert change_value(text, "b.y", True) == f"a:\n  x: 1   # why\n  # y: 2\n\nb:\n  y: true   {CHOSEN}\n  z: 3\n"
    assert change_value(text, "c.w", {"k": "v"}) == text + f'\nc:\n  w: {{"k": "v"}}   {CHOSEN}\n'


@pytest.mark.parametrize("text", ["null", "1e3", "a: b", "-x", "~", "no", "#", 'a"b', "é", "0x1f", "4:30", "a/b-c_d.e"])
def test_a_text_is_the_same_text_in_yaml(text: str) -> None:
    spec = (
        f"name: x\nmodel: {{name_or_path: {quote_scalar(text)}}}\nlora: {{r: 8}}\n"
        "data: {train: t.jsonl}\ntraining: {max_steps: 1}\n"
    )
    assert parse_spec(spec, source="x").model.name_or_path == text


def answer_questions(here: Path, answers: list[str]) -> str:
    """`init asked` on a terminal of its own, each answer typed when its question stands there; returns the screen."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "dumb", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "lora_jobs", "init", "asked"]
    process = subprocess.Popen(command, cwd=here, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    screen, typed, deadline = "", 0, time.monotonic() + 240
    try:
        while time.monotonic() < deadline:
            ready, _, _ = select.select([ours], [], [], 1.0)
            if ready:
                try:
                    screen += os.read(ours, 65536).decode("utf-8", "replace")
                except OSError:  # the other side is closed: Linux says EIO
                    break
            if typed < len(answers) and screen.count("]: ") > typed:
                os.write(ours, f"{answers[typed]}\n".encode())
                typed += 1
        assert process.wait(timeout=60) == 0, screen
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return screen


def test_a_terminal_is_asked_and_asked_again(here: Path) -> None:
    answers = ["gemma-2-2c", "gemma-2-2b", "", "-", "leonardo", "", "me", "2", "02:00:00"]
    screen = answer_questions(here, answers)
    assert "did you mean gemma-2-2b?" in screen
    spec = load_spec(here / "asked.yaml")
    assert (spec.model.name_or_path, spec.data.eval, spec.resources.account) == ("google/gemma-2-2b", None, "me")
    assert (spec.resources.partition, spec.resources.gpus_per_node) == ("boost_usr_prod", 2)
    assert spec.resources.time == "02:00:00"
