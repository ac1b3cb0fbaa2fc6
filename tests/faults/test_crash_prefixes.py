"""A crash after every operation of a real save, and within every write: the last committed checkpoint is chosen."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fault_ranks import KINDS, fault, wait_or_end
from save_recording import CALLS, RECORDING, Operation, Replay, load_recording, parse_strace, render_recording
from tiny_runs import RankServer, create_tiny_run, read_logs

from lora_jobs.checkpoints import choose_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

    from fault_ranks import Stopped

    from lora_jobs.runs import Run

pytestmark = pytest.mark.train

LONG = os.environ.get("LORA_JOBS_FAULTS") == "long"
SHARES = (0.0, 0.5, 1.0)
LOSSES = 3
_PUBLISHED = re.compile(r"checkpoint-(\d+)/MANIFEST\.json")


def save_twice(server: RankServer, run: Run, log: Path | None) -> None:
    """Train to step 7 with saves at 2, 4 and 6; from step 3 on strace writes to `log`."""
    ranks = KINDS["zero2"][1]
    faults = [*([fault("on_step_end", 3, "SIGSTOP")] if log else []), fault("on_step_end", 7)]
    job = server.start(run, ranks, dict.fromkeys(range(ranks), faults))
    if log is not None:
        for pid in job.pids:
            wait_until_stopped(pid)
        words = [word for pid in job.pids for word in ("-p", f"{pid}")]
        command = ["strace", "-f", "-y", "-s", "4096", "-e", f"trace={CALLS}", "-o", str(log), *words]
        tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert tracer.stderr is not None
        for _ in job.pids:
            assert "attached" in tracer.stderr.readline()
        job.kill(signal.SIGCONT)
    codes, _ = wait_or_end(job)
    if log is not None:
        tracer.wait(timeout=30)
        tracer.stderr.close()
    assert codes == [-9] * ranks, read_logs(run)


def wait_until_stopped(pid: int) -> None:
    """Return once the process has stopped itself (state T)."""
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)


def record_operations(run: Run, log: Path) -> list[Operation]:
    """The recording of this test's own run: never out of date. LORA_JOBS_FAULTS_RECORD=1 keeps it for others."""
    operations = parse_strace(log.read_text(), run.checkpoints)
    if os.environ.get("LORA_JOBS_FAULTS_RECORD") == "1":
        RECORDING.write_text(render_recording(operations))
    return operations


def find_newest(operations: list[Operation]) -> str:
    """The checkpoint that was published last; before any, the one that was there."""
    published = [_PUBLISHED.fullmatch(str(operation[2])) for operation in operations if operation[0] == "rename"]
    return next((f"checkpoint-{match[1]}" for match in reversed(published) if match), "checkpoint-2")


def find_durable(operations: list[Operation]) -> str:
    """The checkpoint that was published last and whose folder was flushed after that: no loss of power takes it."""
    published, durable = "", "checkpoint-2"
    for operation in operations:
        match = _PUBLISHED.fullmatch(str(operation[-1]))
        if match and operation[0] == "rename":
            published = f"checkpoint-{match[1]}"
        elif operation == ["sync", published]:
            durable = published
    return durable


@pytest.fixture(scope="module")
def saved(server: RankServer, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[Operation], str]:
    """A run that saved at 4 and 6, what that did to the disk, and where the recording is from."""
    root = tmp_path_factory.mktemp("saved")
    log = root / "strace.log" if shutil.which("strace") else None
    run = create_tiny_run(root, "saved-1", tiny, **KINDS["zero2"][0])
    save_twice(server, run, log)
    if log is None:
        return run, load_recording(), "the committed recording (no strace here)"
    return run, record_operations(run, log), "strace of this run"


def test_every_prefix_of_a_save_leaves_the_last_committed_checkpoint(
    saved: tuple[Run, list[Operation], str],
    stopped: Callable[[str], Stopped],
    tmp_path: Path,
    record: Callable[..., None],
) -> None:
    """Killed (all that was written is there) and without power: what was not flushed may be anything, and a file or
    a folder may have no name where the folder that names it was not flushed.
    """
    run, operations, source = saved
    directory = tmp_path / "checkpoints"
    shutil.copytree(stopped("zero2").run.checkpoints / "checkpoint-2", directory / "checkpoint-2")
    replay = Replay(operations, run.checkpoints, directory)
    chance = random.Random(0)  # noqa: S311 - repeatable
    states = wrong = 0

    while replay.done < len(operations):
        expected = find_newest(operations[: replay.done])
        shares = SHARES if operations[replay.done][0] == "write" else (1.0,)
        for share in shares:
            replay.apply(share)
            expected = find_newest(operations[: replay.done])
            choice = choose_checkpoint(directory)
            states += 1
            wrong += choice.chosen is None or choice.chosen.name != expected
            assert wrong == 0, (operations[replay.done - 1], share, expected, [v.reason for v in choice.verdicts])
        for number in range(LOSSES if LONG or replay.done % 8 == 0 else 0):
            lost = tmp_path / "lost"
            replay.lose_power(lost, chance)
            choice = choose_checkpoint(lost)
            states += 1
            wanted = {expected, find_durable(operations[: replay.done])}
            wrong += choice.chosen is None or choice.chosen.name not in wanted
            reasons = [verdict.reason for verdict in choice.verdicts]
            assert wrong == 0, (number, operations[replay.done - 1], wanted, sorted(replay.unsynced), reasons)
            shutil.rmtree(lost)

    record("crash prefix", f"every prefix, {source}", ours="last committed" if not wrong else "other", states=states,
           operations=len(operations))  # fmt: skip
    assert [operation for operation in operations if _PUBLISHED.fullmatch(str(operation[-1]))], "nothing was published"
    assert states > len(operations) > 50


def test_every_file_of_a_manifest_is_flushed_before_it_is_published(saved: tuple[Run, list[Operation], str]) -> None:
    """And the folder has its name in checkpoints/ before that: else it could go, and older ones with the rotation."""
    _, operations, _ = saved
    unsynced: set[str] = set()
    unnamed: set[str] = set()
    published = 0
    for operation in operations:
        kind, path = operation[0], str(operation[1])
        if kind == "mkdir":
            unnamed.add(path)
        elif kind == "write":
            unsynced.add(path)
        elif kind in {"sync", "unlink"}:
            unsynced.discard(path)
            unnamed = {name for name in unnamed if kind != "sync" or str(Path(name).parent) != path}
        elif kind == "rename":
            match = _PUBLISHED.fullmatch(str(operation[2]))
            if match:
                published += 1
                folder = f"checkpoint-{match[1]}/"
                left = {name for name in unsynced if name.startswith(folder) and "/." not in name}
                assert not left, left
                assert not unnamed, unnamed
            if path in unsynced:
                unsynced.discard(path)
                unsynced.add(str(operation[2]))
    assert published == 2
