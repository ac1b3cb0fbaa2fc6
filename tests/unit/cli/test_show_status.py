"""Lines of status: what they say in each state, that they fit, and that a redraw never clears the screen."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from lora_jobs.cli.screen import build_console, build_table, warn
from lora_jobs.cli.show_status import render_frame, render_status
from lora_jobs.cli.status_line import describe_status, format_span, format_when
from lora_jobs.runs import create_run
from lora_jobs.workflows.observing import RunStatus, StatusReport
from lora_jobs.workflows.watching import next_pause, watch_status

ROOT = Path(__file__).resolve().parents[3]
NOW = datetime(2026, 11, 20, 18, 44)


def make(state: str, **values: Any) -> RunStatus:
    nothing = dict.fromkeys(
        ("reason", "next_step", "priority", "partition", "expected_start", "elapsed_seconds", "limit_seconds", "step",
         "total_steps", "loss", "eval_loss", "last_committed_step", "adapter")
    )  # fmt: skip
    given = {"run": "gemma2_9b_svg-3", "directory": "/r", "job_id": "2584773", "backend": "slurm", "attempts": 1,
             "explanation": "words", **nothing, **values}  # fmt: skip
    return RunStatus(state=state, active=state in {"PENDING", "RUNNING", "BOILING_OVER"}, **given)


PENDING = make("PENDING", reason="Priority", reason_text="others go first", priority=5543, rank=14, pending_jobs=132,
               expected_start="2026-11-20T21:44:00", tasks={"PENDING": 1})  # fmt: skip
RUNNING = make("RUNNING", step=120, total_steps=500, loss=1.23456, tokens_per_second=2300.4, remaining_seconds=18000,
               expected_finish="2026-11-20T23:10:05",
               memory_peak_bytes=41 * 2**30, predicted_bytes=44 * 2**30)  # fmt: skip
SWEEP = make("PENDING", run="s-1", sweep="s-1", explanation="1000 pending", reason_text="others go first", rank=14,
             pending_jobs=1132, expected_start="2026-11-20T21:44:00", tasks={"PENDING": 1000})  # fmt: skip
TIMEOUT = make("TIMEOUT", step=480, last_committed_step=470, next_step="lora-jobs resume 2584773")


@pytest.mark.parametrize(
    ("status", "wanted"),
    [
        (PENDING, "14 of 132 pending, starts 21:44 in 3 h, others go first, prio 5543"),
        (RUNNING, "120/500, loss 1.235, 2300 tok/s, 5 h left, ends 23:10, 41.0/44.0 GiB"),
        (TIMEOUT, "timed out at step 480, committed 470: lora-jobs resume 2584773"),
        (make("PENDING", priority=0, reason_text="held by you"), "held by you"),
        (make("RUNNING"), "starting"),
        (make("COMPLETED", step=9, eval_loss=0.5, adapter="/a"), "done at step 9, held-out loss 0.500"),
        (make("BOILING_OVER", reason="Heat"), "Heat"),
        (SWEEP, "1000 pending, the first is 14 of 1132, starts 21:44 in 3 h, others go first"),
    ],
)
def test_what_matters_in_each_state(status: RunStatus, wanted: str):
    assert describe_status(status, NOW) == wanted


SPECS = sorted(path.stem for path in (Path(__file__).parents[3] / "jobs").glob("*.yaml"))
FAILED = make("FAILED", step=480, last_committed_step=470, next_step="lora-jobs resume 2584773",
              reason="NonZeroExitCode", reason_text="ended with an error")  # fmt: skip
OUT_OF_MEMORY = replace(TIMEOUT, state="OUT_OF_MEMORY", reason="OutOfMemory", reason_text="out of host memory")
RECORDED = replace(FAILED, reason="CUDA out of memory. Tried to allocate 2.00 GiB by a GPU of 63.4", reason_text=None)
LOCAL = make("KILLED", job_id="41234", backend="local", step=480, last_committed_step=470)
FAR = replace(PENDING, rank=1314, pending_jobs=10132, priority=1055430, expected_start="2026-11-21T09:00:00",
              reason_text="next, waits for free nodes")  # fmt: skip
HELD = make("PENDING", priority=0, reason_text="held by you")
LONG = replace(RUNNING, step=12000, total_steps=50000, tokens_per_second=23004.0, remaining_seconds=72000.0,
               expected_finish="2026-11-21T23:10:05")  # fmt: skip
KEPT = [
    (PENDING, ("14 of 132", "21:44 in 3 h", "others go first", "prio 5543")),
    (FAR, ("1314 of 10132", "Sat 09:00 in 14 h", "prio 1055430")),
    (HELD, ("held by you",)),
    (RUNNING, ("120/500", "loss 1.23", "2300 tok/s", "5 h left", "ends 23:10", "41")),
    (LONG, ("12000/50000", "loss 1.23", "20 h left", "ends Sat 23:10")),
    (TIMEOUT, ("at step 480", "committed 470: lora-jobs resume 2584773")),
    (OUT_OF_MEMORY, ("at step 480", "committed 470: lora-jobs resume 2584773")),
    (FAILED, ("at step 480", "committed 470: lora-jobs resume 2584773")),
    (RECORDED, ("committed 470: lora-jobs resume 2584773 (CUDA out of",)),
    (LOCAL, ("lora-jobs resume {run}",)),
]


@pytest.mark.parametrize("name", SPECS)
def test_at_100_columns_what_matters_stays(name: str):
    """All states in one table, with ids of seven digits: none of them takes another's room."""
    rows = [replace(status, run=f"{name}-1") for status, _ in KEPT]
    rows[-1] = replace(rows[-1], next_step=f"lora-jobs resume {name}-1")
    lines = [line.plain for line in render_status(StatusReport(tuple(rows)), width=100, now=NOW)][1:]
    assert max(len(line) for line in lines) <= 100
    for line, (status, kept) in zip(lines, KEPT, strict=True):
        assert [words for words in kept if words.format(run=f"{name}-1") not in line] == [], line
        assert line.partition(" ")[0].endswith("-1")
        if status.state == "RUNNING":
            assert re.search(r"41(/44G|\.0/44\.0 GiB)$", line), line


@pytest.mark.parametrize("width", [60, 80, 100, 140, 300])
@pytest.mark.parametrize("name", SPECS)
def test_at_any_width_a_command_is_whole_or_not_there(name: str, width: int):
    sweep = replace(SWEEP, run=f"{name}-sweep-1", sweep=f"{name}-sweep-1", job_id="2584773_[0-99]", state="FAILED",
                    active=False, explanation="99 completed, 1 failed; best held-out loss 1.2345")  # fmt: skip
    rows = [replace(status, run=f"{name}-1") for status, _ in KEPT[:-1]]
    rows += [replace(row, run=row.run if row.sweep else f"{name}-1", next_step=f"lora-jobs resume {name}-1")
             for row in (LOCAL, sweep)]  # fmt: skip
    lines = [line.plain for line in render_status(StatusReport(tuple(rows)), width=width, now=NOW)][1:]
    assert max(len(line) for line in lines) <= width
    for line, row in zip(lines, rows, strict=True):
        assert "lora-j" not in line or (row.next_step or "-") in line
        assert line.count("(") == line.count(")")
    if width == 300:
        assert all(describe_status(row, NOW) in line for line, row in zip(lines, rows, strict=True))


def test_arrays_are_folded_and_a_long_name_keeps_its_number():
    array = make(
        "RUNNING", run="a" * 60 + "-1", job_id="77_[0-9]", tasks={"RUNNING": 2, "PENDING": 8}, loss=1.0, step=1
    )
    other = replace(array, run="a" * 60 + "-2")
    first, second = [line.plain for line in render_status(StatusReport((array, other)), width=100, now=NOW)][1:]
    assert first.startswith("aaaaaaaaaaaaaaa…aaaaaa-1 77 x10 RUNNING 2/10  1/?, loss 1.000")
    assert second.startswith("aaaaaaaaaaaaaaa…aaaaaa-2 77 x10 ")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("2026-11-20T21:44:00", "21:44 in 3 h"), ("2026-11-21T09:00:00", "Sat 09:00 in 14 h"),
     ("2026-12-20T09:00:00", "20 Dec 09:00 in 30 d"), ("2026-11-20T18:43:00", "18:43 (any moment)"),
     ("Unknown", "Unknown")],
)  # fmt: skip
def test_times_as_a_clock_and_how_far_off(text: str, wanted: str):
    assert format_when(text, NOW) == wanted


def test_spans():
    assert [format_span(seconds) for seconds in (0, 59, 60, 3599, 3600, 86400, 180000)] == [
        "0 s", "59 s", "1 min", "60 min", "1 h", "24 h", "2 d",
    ]  # fmt: skip


def test_a_frame_overwrites_and_never_clears():
    frame = render_frame(StatusReport((PENDING,), ("a note\x1b[2J",)), 80, 24, NOW)
    assert frame.startswith("\x1b[H")
    assert frame.count("\x1b[K") == frame.count("\r\n") + 1
    assert "\x1b[2J" not in frame
    assert frame.endswith("\x1b[J")
    assert len(render_frame(StatusReport((PENDING,) * 50), 80, 10, NOW).split("\r\n")) == 10


def test_watch_asks_ten_seconds_apart_at_the_least_and_backs_off():
    reports = [StatusReport((PENDING,))] * 6 + [StatusReport((RUNNING,)), StatusReport((TIMEOUT,))]
    slept: list[float] = []
    answers = iter(reports)
    assert list(watch_status(lambda: next(answers), sleep=slept.append)) == reports
    assert slept == [10, 15, 22.5, 33.75, 50.625, 60, 10]


def test_pauses():
    assert next_pause(30, changed=True, shortest=1) == 10
    assert next_pause(10, changed=False, shortest=120) == 120


HEAVY = {"pydantic", "psutil", "yaml", "jinja2", "submitit", "logging", "statistics", "torch"}
SPEC = {"pydantic", "yaml", "statistics"}
"""What reading one takes, and row lengths."""


@pytest.mark.parametrize(
    ("words", "heavy"),
    [
        (["status"], HEAVY | {"rich"}),
        (["why"], HEAVY | {"rich"}),
        (["status", "a-1"], HEAVY),
        (["check", str(ROOT / "jobs/gemma2_9b_svg.yaml")], HEAVY - SPEC | {"rich"}),
    ],
)
def test_the_start_up_leaves_out_what_a_look_does_not_need(words: list[str], heavy: set[str], tmp_path: Path):
    """An empty run folder, so nothing is asked, and `why` says that there are no runs; or one run, never submitted."""
    if words[1:] == ["a-1"]:
        create_run(tmp_path, words[1], {"spec.yaml": "name: a\ntraining:\n  targets: {}\n"})
    code = (
        "import sys; sys.argv[0] = 'lora-jobs'\n"
        "from lora_jobs.cli.main import run\n"
        "try: run()\n"
        "except SystemExit: print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    environment = {**os.environ, "LORA_JOBS_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "lora_jobs" in loaded
    assert loaded & heavy == set()


def test_no_color_means_no_style_at_all(monkeypatch: pytest.MonkeyPatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for value, wanted in (("", "\x1b[1;31merror: a\ufffd[2Jb\x1b[0m\n"), ("1", "error: a\ufffd[2Jb\n")):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("NO_COLOR", value)
        warn("error: a\x1b[2Jb", "bold red")
        assert terminal.getvalue() == wanted


def test_a_table_whose_reader_has_gone_ends_as_a_line_does(monkeypatch: pytest.MonkeyPatch):
    class Gone(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(BrokenPipeError):
        build_console().print(build_table("A"))
