"""The command line as typed: bad input gets one message, the right exit code, and leaves nothing behind."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GEMMA = str(ROOT / "jobs/gemma2_9b_svg.yaml")
GOOD = Path(GEMMA).read_text()


def run(directory: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LORA_JOBS_HOME": str(directory / "runs"), **variables}
    command = [sys.executable, "-m", "lora_jobs", *arguments]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


LETTERS = "abcdefghij"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in itertools.pairwise(LETTERS)
)

SPECS: dict[str, tuple[str | bytes, list[str]]] = {
    "empty": ("", ["empty"]),
    "not_yaml": ("a: [1, 2\nb: }", ["line"]),
    "binary": (b"\x00\xff\xfe\x01", ["is not UTF-8 text"]),
    "list": ("- a\n- b\n", ["key: value", "line 1"]),
    "bomb": (BOMB, ["aliases write it out to more than"]),
    "wrong_type": (GOOD.replace("  r: 64", "  r: true"), ["lora.r", "line"]),
    "unknown_key": (GOOD.replace("lora_dropout:", "lora_droput:"), ["did you mean", "lora_dropout", "line"]),
    "unknown_model": (GOOD.replace("google/gemma-2-9b-it", "google/gemma-2-9c-it"), ["google/gemma-2-9c-it"]),
    "unknown_partition": (GOOD.replace("boost_usr_prod", "boost_usr_prd"), ["boost_usr_prd", "boost_usr_prod"]),
    "control_character": (GOOD.replace("name: gemma2_9b_svg", 'name: "x\\nrm"'), ["name"]),
}  # fmt: skip


@pytest.mark.parametrize("case", SPECS)
def test_a_bad_spec_is_one_message_and_exit_2(case: str, tmp_path: Path) -> None:
    content, expected = SPECS[case]
    spec = tmp_path / "job.yaml"
    spec.write_bytes(content if isinstance(content, bytes) else content.encode())
    done = run(tmp_path, "check", "job.yaml")
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert [word for word in expected if word not in done.stderr] == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["check", "missing.yaml"], 2, ["missing.yaml"]),
        (["check", "."], 2, ["directory"]),
        (["check"], 2, ["SPEC"]),
        (["chekc", "x"], 2, ["chekc"]),
        (["check", GEMMA, "--set", "lora.q=3"], 2, ["lora.q"]),
        (["check", GEMMA, "--set", "nonsense"], 2, ["section.key=value"]),
        (["submit", GEMMA, "--cluster", "moon"], 2, ["moon"]),
        (["render", "missing.yaml"], 2, ["missing.yaml"]),
        (["status", "nobody"], 5, ["nobody"]),
        (["resume", "2584773"], 5, ["2584773"]),
        (["verify", "../../etc"], 5, []),
        (["logs"], 5, []),
        (["cancel", "x-1"], 5, ["x-1"]),
    ],
)
def test_bad_usage(arguments: list[str], code: int, words: list[str], tmp_path: Path) -> None:
    done = run(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert [word for word in words if word not in done.stderr] == []
    assert not (tmp_path / "runs").exists()


def test_with_json_an_error_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(GOOD.replace("  r: 64", "  r: true\n  s: 1"))
    done = run(tmp_path, "check", "job.yaml", "--json")
    answer = json.loads(done.stdout)
    assert (done.returncode, answer["exit_code"]) == (2, 2)
    assert {problem["path"] for problem in answer["problems"]} == {"lora.r", "lora.s"}
    assert all(problem["line"] for problem in answer["problems"])


def test_check_json_holds_the_promised_keys(tmp_path: Path) -> None:
    done = run(tmp_path, "check", GEMMA, "--json")
    answer = json.loads(done.stdout)
    promised = (
        "fits world_size gpu parameters estimate host_memory_bytes checkpoint_bytes problems warnings suggestions"
    )
    assert answer.keys() >= set(promised.split())
    assert answer["gpu"].keys() >= {"name", "memory_bytes", "usable_bytes"}
    assert answer["estimate"].keys() >= {"peak_bytes", "allocated_peak_bytes", "components"}
    assert answer["parameters"]["base"] == 9_241_705_984
    assert answer["world_size"] == 2


def test_what_does_not_fit_exits_3_and_names_a_change_that_does(tmp_path: Path) -> None:
    spec = GEMMA
    first = json.loads(run(tmp_path, "check", spec, "--set", "resources.gpu=L4", "--json").stdout)
    assert not first["fits"]
    for suggestion in first["suggestions"]:
        sets = [word for key, value in suggestion["set"].items() for word in ("--set", f"{key}={json.dumps(value)}")]
        again = json.loads(run(tmp_path, "check", spec, "--set", "resources.gpu=L4", *sets, "--json").stdout)
        assert (again["estimate"]["peak_bytes"], again["fits"]) == (suggestion["peak_bytes"], suggestion["fits"])


@pytest.mark.train
def test_where_nothing_can_be_written_nothing_is_left(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    spec = str(ROOT / "jobs/tiny_gemma2.yaml")
    done = run(tiny, "submit", spec, "--cluster", "local", LORA_JOBS_HOME=str(tmp_path / "file/runs"))
    assert (done.returncode, "Not a directory" in done.stderr) == (5, True), done.stderr
    assert str(tmp_path / "file/runs") in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_pipe_gets_no_colour_and_no_markup(tmp_path: Path) -> None:
    done = run(tmp_path, "check", GEMMA, TERM="xterm-256color")
    assert "\x1b" not in done.stdout + done.stderr


def test_init_writes_a_spec_that_loads_and_keeps_what_is_there(tmp_path: Path) -> None:
    assert run(tmp_path, "init", "first").returncode == 0
    text = (tmp_path / "first.yaml").read_text()
    assert "name: first\n" in text
    again = run(tmp_path, "init", "first")
    assert (again.returncode, (tmp_path / "first.yaml").read_text()) == (2, text)
    checked = run(tmp_path, "check", "first.yaml", "--set", "resources.gpu=L40S", "--json")
    assert json.loads(checked.stdout)["parameters"]["base"] == 1_235_814_400


def test_the_login_commands_import_no_torch(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise SystemExit('torch was imported')")
    data = tmp_path / "train.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    prompts = ("--set", f"data.train={data}", "--set", "data.format=prompt_completion", "--set", f"data.eval={data}")
    for arguments, code in (
        (["check", GEMMA], 0),
        (["render", GEMMA], 0),
        (["submit", GEMMA, "--dry-run", *prompts], 0),
        (["status"], 0),
        (["resume"], 5),
        (["verify"], 5),
        (["logs"], 5),
        (["cancel"], 5),
        (["models"], 0),
        (["gpus"], 0),
        (["clusters"], 0),
        (["schema"], 0),
    ):
        done = run(tmp_path, *arguments, PYTHONPATH=str(tmp_path))
        assert "torch was imported" not in done.stdout + done.stderr, arguments
        assert done.returncode == code, (arguments, done.stdout, done.stderr)
