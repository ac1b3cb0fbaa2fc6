"""JSONL files: broken lines by number, rows without what their format needs."""

# ruff: noqa: E501  (tables: one case a line)
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lora_jobs.errors import SpecError
from lora_jobs.spec import DataSpec, find_data_problems, iterate_rows

GOOD: dict[str, dict[str, Any]] = {
    "prompt_completion": {"prompt": "a", "completion": "b"},
    "chat": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "text": {"text": "a"},
    "svg_caption": {"svg": "<svg/>", "caption": "b", "other": 3},
}


def find(tmp_path: Path, content: str | bytes, data_format: str = "text", **data: Any) -> list[str]:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    found = find_data_problems(DataSpec(train=str(path), format=data_format, **data))  # type: ignore[arg-type]
    assert {problem.path for problem in found} <= {"data.train", "data.eval"}
    assert all(problem.line is None and problem.message.isprintable() for problem in found)
    return [problem.message.replace(str(path), "rows.jsonl") for problem in found]


@pytest.mark.parametrize("data_format", GOOD)
def test_good_rows(tmp_path: Path, data_format: str) -> None:
    lines = (json.dumps(GOOD[data_format]) + "\n") * 3
    assert find(tmp_path, lines, data_format) == []
    assert find(tmp_path, "\ufeff" + lines + "\n\n" + lines.rstrip("\n"), data_format) == []
    assert list(iterate_rows(tmp_path / "rows.jsonl")) == [GOOD[data_format]] * 6


@pytest.mark.parametrize(
    ("data_format", "row", "fault"),
    [
        ("text", {}, "no key 'text' (keys here: none)"),
        ("text", {"Text": "a"}, "no key 'text'; is it 'Text'? (keys here: Text)"),
        ("text", {"text": ""}, "text is empty"),
        ("text", {"text": " \n"}, "text is empty"),
        ("text", {"text": None}, "text is null: wanted text"),
        ("text", {"text": 3}, "text is 3: wanted text"),
        ("text", {"text": ["a"]}, "text is ['a']: wanted text"),
        ("text", {"text": "\ud800"}, "text holds half of a surrogate pair: no tokenizer can read it"),
        ("prompt_completion", {"prompt": "a"}, "no key 'completion' (keys here: prompt)"),
        ("svg_caption", {"svg": "<svg/>", "captions": "b"}, "no key 'caption'; is it 'captions'? (keys here: svg, captions)"),
        ("chat", {"messages": []}, "messages is []: wanted a list of role and content"),
        ("chat", {"messages": "hi"}, "messages is 'hi': wanted a list of role and content"),
        ("chat", {"messages": ["hi"]}, "messages[0] is 'hi': wanted role and content"),
        ("chat", {"messages": [{"role": "bot", "content": "a"}]}, "messages[0] has role 'bot': wanted one of system, user, assistant, model, tool"),
        ("chat", {"messages": [{"role": ["user"], "content": "a"}]}, "messages[0] has role ['user']: wanted one of system, user, assistant, model, tool"),
        ("chat", {"messages": [{"role": "user"}]}, "content of messages[0] is null: wanted text"),
        ("chat", {"messages": [{"role": "user", "content": "a"}]}, "the last message is not the assistant's: there is nothing to learn"),
    ],
)  # fmt: skip
def test_one_wrong_row_is_named_by_its_line(tmp_path: Path, data_format: str, row: object, fault: str) -> None:
    good = json.dumps(GOOD[data_format])
    content = f"{good}\n\n{json.dumps(row)}\n{good}\n"
    assert find(tmp_path, content, data_format) == [f"rows.jsonl line 3: {fault}"]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'{"text": "a"', "not JSON: Expecting ',' delimiter at column 13"),
        (b"hello", "not JSON: Expecting value at column 1"),
        (b"[1, 2]", "wanted an object with keys, got [1, 2]"),
        (b'"text"', "wanted an object with keys, got 'text'"),
        (b'{"text": "\xff"}', "byte 11 is not UTF-8 text"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not usable JSON: "),
        (b"[" * 100_000, "not usable JSON: "),
        (b"\x00\x01\x02", "not JSON: Expecting value at column 1"),
    ],
)
def test_a_broken_line_is_named_by_number(tmp_path: Path, line: bytes, fault: str) -> None:
    (message,) = find(tmp_path, b'{"text": "a"}\n' + line + b"\n")
    assert message.startswith(f"rows.jsonl line 2: {fault}")
    with pytest.raises(SpecError, match=r"rows\.jsonl line 2: "):
        list(iterate_rows(tmp_path / "rows.jsonl"))


def test_both_keys_of_a_row_can_be_wrong(tmp_path: Path) -> None:
    assert len(find(tmp_path, "{}\n", "svg_caption")) == 2


def test_it_stops_after_twenty(tmp_path: Path) -> None:
    messages = find(tmp_path, "x\n" * 1000)
    assert len(messages) == 21
    assert messages[19].startswith("rows.jsonl line 20: ")
    assert messages[20] == "rows.jsonl: stopped here, there may be more"


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_no_rows(tmp_path: Path, content: str) -> None:
    assert find(tmp_path, content) == ["rows.jsonl has no rows"]


def test_files_that_are_not_there_or_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    data = DataSpec(train=str(tmp_path / "none.jsonl"), eval=str(tmp_path))
    train, evaluation = find_data_problems(data)
    assert (train.path, evaluation.path) == ("data.train", "data.eval")
    assert f"{tmp_path}/none.jsonl: no such file (from {Path.cwd()})" == train.message
    assert "is no regular file" in evaluation.message
    (pipe,) = find_data_problems(DataSpec(train=str(tmp_path / "pipe")))
    assert "is no regular file" in pipe.message
    with pytest.raises(SpecError, match="cannot be read: No such file"):
        list(iterate_rows(tmp_path / "none.jsonl"))


def test_parquet_is_read_and_checked_like_jsonl(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": " "}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert list(iterate_rows(path)) == rows
    (problem,) = find_data_problems(DataSpec(train=str(path)))
    assert (problem.path, problem.message) == ("data.train", f"{path} row 2: completion is empty")

    path.write_bytes(path.read_bytes()[:-7])
    (problem,) = find_data_problems(DataSpec(train=str(path)))
    assert problem.message.startswith(f"{path} is no whole Parquet file: ")
    with pytest.raises(SpecError, match="is no whole Parquet file"):
        list(iterate_rows(path))


def test_the_keys_of_a_dataset_need_one() -> None:
    with pytest.raises(ValueError, match=r"needs data\.dataset"):
        DataSpec(train="rows.jsonl", dataset_config="small")


@pytest.mark.parametrize(("asked", "there"), [("chat", "svg_caption"), ("text", "chat"), ("prompt_completion", "text")])
def test_rows_of_another_format_are_one_problem(asked: str, there: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps(GOOD[there]) + "\n") * 30)
    (problem,) = find_data_problems(DataSpec(train=str(path), format=asked))  # type: ignore[arg-type]
    assert problem.path == "data.format"
    assert problem.message.startswith(f"is {asked}, but the rows of {path} have ")
    assert problem.message.endswith(f": wanted {there}")
