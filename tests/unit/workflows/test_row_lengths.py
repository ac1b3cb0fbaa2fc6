"""The lengths of rows: guessed, or as they were counted for this very data, tokenizer and format."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from lora_jobs.runs import RowLengths, record_lengths
from lora_jobs.spec import JobSpec, parse_spec
from lora_jobs.workflows.lengths import find_key, judge_lengths, load_rows

if TYPE_CHECKING:
    from pathlib import Path

    from lora_jobs.sizing.duration import Rows


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_JOBS_HOME", str(tmp_path / "runs"))
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    write_rows(tmp_path, 10, 20, 30)
    return tmp_path


def write_rows(here: Path, *characters: int) -> None:
    rows = [{"prompt": "p" * (count - 1), "completion": "c"} for count in characters]
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def build_spec(**data: object) -> JobSpec:
    values = {
        "name": "t",
        "model": {"name_or_path": "tokenizer"},
        "lora": {"r": 4},
        "data": {"train": "rows.jsonl", "max_length": 64, **data},
        "training": {"max_steps": 1},
    }
    return parse_spec(json.dumps(values), source="test")


def count(here: Path, *lengths: int, more: bool = False, **data: object) -> None:
    """As `lora-jobs data` leaves it."""
    spec = build_spec(**data)
    key = find_key(spec, spec.data.train)
    assert key is not None
    record_lengths(here / "runs", key, RowLengths(lengths, more))


def load(**data: object) -> Rows:
    train, evaluation = load_rows(build_spec(**data))
    assert train is not None
    assert evaluation is None
    return train


def test_nothing_counted_is_a_guess() -> None:
    rows = load()
    assert (rows.lengths, rows.basis) == ((15, 18, 21), "guessed")


def test_what_was_counted_is_taken_whatever_max_length_is(here: Path) -> None:
    count(here, 40, 5, 7)
    assert (load().lengths, load().basis) == ((5, 7, 40), "counted")
    assert (load(max_length=8).lengths, load(max_length=8).too_long) == ((5, 7), 1)
    assert load(packing=True, completion_only=False).basis == "counted"


def test_the_rows_beyond_those_counted_follow_their_rate(here: Path) -> None:
    count(here, 5, 10, more=True)
    assert (load().lengths, load().basis) == ((5, 10, 15), "partly counted")


def test_other_data_tokenizer_or_format_is_not_what_was_counted(here: Path) -> None:
    count(here, 5, 7, 9)
    assert load(format="prompt_completion").basis == "counted"
    (here / "tokenizer" / "tokenizer.json").write_text('{"other": 1}')
    assert load().basis == "guessed"
    (here / "tokenizer" / "tokenizer.json").write_text("{}")
    assert load().basis == "counted"
    write_rows(here, 10, 20, 31)
    assert load().basis == "guessed"


def test_a_file_that_is_damaged_counts_for_nothing(here: Path) -> None:
    count(here, 5, 7, 9)
    (path,) = (here / "runs" / "lengths").iterdir()
    for text in ("", "[]", '{"counts": [["a", 1]], "more": false}', '{"counts": 3, "more": false}'):
        path.write_text(text)
        assert load().basis == "guessed"


def test_a_split_of_a_dataset_is_known_once_it_was_counted(here: Path) -> None:
    split = {"dataset": "org/drawings", "train": "train"}
    assert load_rows(build_spec(**split)) == (None, None)
    count(here, 5, 7, more=True, **split)
    assert load_rows(build_spec(**split)) == (None, None)
    count(here, 5, 7, **split)
    assert load(**split).lengths == (5, 7)


def test_a_directory_of_data_has_no_key(here: Path) -> None:
    (here / "folder").mkdir()
    spec = build_spec(dataset="folder", train="train")
    assert find_key(spec, "train") is None
    assert load_rows(spec) == (None, None)


def test_counted_lengths_judge_max_length(here: Path) -> None:
    assert list(judge_lengths(build_spec(), load_rows(build_spec()))) == []
    count(here, 5, 7, 9)
    for limit, words in {
        64: ["no row is longer than 16 tokens: --set data.max_length=16 would need less memory"],
        20: [],
        8: ["data.train: 1 of 3 rows are longer than data.max_length 8: left out"],
    }.items():
        spec = build_spec(max_length=limit)
        assert list(judge_lengths(spec, load_rows(spec))) == words
    packed = build_spec(packing=True)
    assert list(judge_lengths(packed, load_rows(packed))) == []
