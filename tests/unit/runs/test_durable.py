"""Files that are whole or not there, and lines that a crash can tear but never glue together."""

from __future__ import annotations

import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from lora_jobs.errors import RunError
from lora_jobs.runs.durable import append_line, load_lines, write_atomic


def test_a_file_is_written_whole_and_privately(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "grün\n")
    assert path.read_bytes() == "grün\n".encode()
    assert path.stat().st_mode & 0o777 == 0o600
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]


def test_a_failure_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\ud800")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match=r"cannot write .*folder: Is a directory"):
        write_atomic(tmp_path / "folder", "x")
    assert path.read_text() == "old"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.txt", "folder"]


def test_errors_name_the_path_and_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot write .*none/a: No such file or directory"):
        write_atomic(tmp_path / "none" / "a", "x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError) as caught:
        write_atomic(tmp_path / "file" / "a", "x")
    assert caught.value.hint == "a file stands where a directory is wanted: move it, or set LORA_JOBS_HOME"
    with pytest.raises(RunError, match="cannot append to"):
        append_line(tmp_path / "none" / "a", {})


def test_a_full_disk_is_said() -> None:
    with pytest.raises(RunError, match="cannot append to /dev/full: No space left on device") as caught:
        append_line(Path("/dev/full"), {"a": 1})
    assert caught.value.hint == "free some space there, or set LORA_JOBS_HOME to a directory on another disk"


def test_lines_come_back(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    assert load_lines(path) == []
    records: list[dict[str, Any]] = [{"a": 1, "b": "grün\nzwei"}, {"c": [1.5, None, True]}, {}]
    for record in records:
        append_line(path, record)
    assert load_lines(path) == records
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_json_does_not_have_becomes_null(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    append_line(path, {"loss": float("nan"), "norm": float("inf"), "step": 3})
    assert path.read_text() == '{"loss": null, "norm": null, "step": 3, "not_finite": ["loss", "norm"]}\n'


@pytest.mark.parametrize("cut", range(1, 16))
def test_a_torn_last_line_costs_itself_only(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "x.jsonl"
    append_line(path, {"n": 1})
    append_line(path, {"n": 2, "x": "é"})
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    complete = cut == 1  # without its newline the record is still whole
    kept = [{"n": 1}, {"n": 2, "x": "é"}] if complete else [{"n": 1}]
    assert load_lines(path) == kept
    append_line(path, {"n": 3})
    assert load_lines(path) == [*kept, {"n": 3}]


def test_lines_that_are_no_objects_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"n": 1}\n[1]\nnull\n\x00\x00\x00\n\xff\n{"n": \n' + b"[" * 100_000 + b'\n{"n": 2}\n')
    assert load_lines(path) == [{"n": 1}, {"n": 2}]


def append_many(path: Path, writer: int) -> None:
    for number in range(20):
        append_line(path, {"writer": writer, "number": number, "x": "y" * 500})


def test_lines_of_many_writers_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=append_many, args=(path, writer)) for writer in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    records = load_lines(path)
    assert len(records) == 80
    for writer in range(4):
        assert [record["number"] for record in records if record["writer"] == writer] == list(range(20))


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    contents = [str(n) * 20_000 for n in range(2)]
    write_atomic(path, contents[0])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for content in contents:
                write_atomic(path, content)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = {path.read_text() for _ in range(200)}
    finally:
        stop.set()
        writer.join()
    assert seen <= set(contents)
    assert os.listdir(tmp_path) == ["x"]  # noqa: PTH208
