"""A rank that hangs is ended by its own watch, with its stacks in the log."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from lora_jobs.runs import EXIT_HANG, classify_end
from lora_jobs.training.hang import PATIENCE, SET_UP_SECONDS, HangWatch

if TYPE_CHECKING:
    import pytest

HANGS = """
import threading
from lora_jobs.training.hang import HangWatch

def wait_for_a_peer_that_is_gone():
    threading.Event().wait()

watch = HangWatch(1.0, rank=3)
watch.report = lambda reason: print("recorded:", reason, flush=True)
watch.start()
watch.begin_training()
wait_for_a_peer_that_is_gone()
"""


def test_a_process_that_hangs_ends_with_its_stacks_and_its_own_code() -> None:
    ended = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == EXIT_HANG
    assert ended.stdout.startswith("recorded: rank 3: no progress for ")
    assert "wait_for_a_peer_that_is_gone" in ended.stderr
    assert classify_end(log=ended.stderr, exit_code=1).cause.name == "hang"


def test_the_bound_follows_the_longest_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    watch = HangWatch(30.0)
    assert watch.bound_seconds == SET_UP_SECONDS
    watch.begin_training()
    for seconds in (1.0, 20.0, 2.0):
        now += seconds
        watch.beat()
    assert watch.bound_seconds == PATIENCE * 20.0
    watch.end_training()
    assert watch.bound_seconds == SET_UP_SECONDS
    watch.begin_training()
    now += 1.0
    watch.beat()
    assert watch.bound_seconds == 30.0
