"""A disk that is full, read-only, or a rank that stands still within a save: nothing wrong is ever resumed from."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fault_ranks import (
    KINDS,
    LONGEST_SECONDS,
    Stopped,
    copy_stock,
    fault,
    find_error,
    resume_stock,
    start_stock,
    wait_or_end,
    wait_until_stopped,
)  # fmt: skip
from interruptions import finish, interrupt
from tiny_runs import Job, RankServer, create_tiny_run, hash_adapter, read_logs

from lora_jobs.checkpoints import choose_checkpoint
from lora_jobs.runs import EXIT_DISK_FULL, EXIT_HANG, load_attempts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.train

LONG = os.environ.get("LORA_JOBS_FAULTS") == "long"
SHARES = (0.05, 0.25, 0.5, 0.75, 0.95) if LONG else (0.5,)
PLENTY = "256m"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")


@contextmanager
def mounted(path: Path, size: str, *options: str) -> Iterator[None]:
    """A file system in memory of this size; skipped where the kernel does not let us."""
    path.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"can't mount a tmpfs here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def resize(path: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(path)], check=True)


def count_bytes(directory: Path, *, spare: int = 0) -> int:
    """What the files take in pages of 4 KiB, and `spare` more pages for each of them: logs and records go on."""
    sizes = [path.stat().st_size for path in directory.rglob("*") if path.is_file()]
    return sum((-(-size // 4096) + spare) * 4096 for size in sizes)


@needs_root
@pytest.mark.parametrize(
    ("share", "noticed"), [(share, noticed) for noticed in ((False, True) if LONG else (False,)) for share in SHARES]
)
def test_a_disk_that_gets_full_within_a_save(
    share: float,
    noticed: bool,
    stopped: Callable[[str], Stopped],
    server: RankServer,
    tiny: Path,
    tmp_path: Path,
    record: Callable[..., None],
) -> None:
    """There is room for checkpoint-2 and a share of checkpoint-4; later there is room again.

    `noticed`: it is full before the ranks look whether the next save fits. Else another job fills it after they have.
    """
    found = stopped("zero2")
    leave = int(share * count_bytes(found.run.checkpoints / "checkpoint-4"))
    small = tmp_path / "small"
    with mounted(small, PLENTY):
        run = create_tiny_run(small, "full-1", tiny, **KINDS["zero2"][0])
        stop = {} if noticed else {0: [{**fault("on_log", 4), "fill": str(small / "filler"), "leave": leave}]}
        if noticed:
            codes, _ = wait_or_end(server.start(run, 2, {rank: [fault("on_step_end", 3)] for rank in (0, 1)}))
            assert codes == [-9, -9], read_logs(run)
            resize(small, str(count_bytes(small, spare=1) + leave))
        ended = interrupt(server, run, 2, faults=stop)
        reason = load_attempts(run)[-1].reason
        logs = read_logs(run)
        choice = choose_checkpoint(run.checkpoints)
        chosen = choice.chosen.name if choice.chosen else None
        resize(small, PLENTY)
        (small / "filler").unlink(missing_ok=True)
        same = finish(server, run, 2) == found.reference
    stock = fill_stock(server, found, tmp_path / "stock", share)
    how = "noticed before it" if noticed else "filled within it"
    record("full disk", f"room for {share:.0%} of the save, {how}", kind="zero2", stock=stock[0], stock_detail=stock[1],
           ours="fell back" if same else "other result", ours_detail=f"exit codes {ended.codes}: {reason}",
           hung=ended.hung, good_one_exists=True)  # fmt: skip
    assert not ended.hung, logs
    assert ended.codes == [EXIT_DISK_FULL] * 2, (reason, logs)
    assert (chosen, same) == ("checkpoint-2", True), logs


def fill_stock(server: RankServer, found: Stopped, directory: Path, share: float) -> tuple[str, str]:
    """The same with the stock trainer: full within the save of checkpoint-4, resumed once there is room."""
    source = Path(found.stock.directory)
    with mounted(directory, PLENTY):
        job = copy_stock(found.stock, directory / "run")
        shutil.rmtree(directory / "run" / "checkpoint-4")
        left = int(share * count_bytes(source / "checkpoint-4"))
        resize(directory, str(count_bytes(directory, spare=1) + left))
        codes, hung = wait_or_end(start_stock(server, job, 2))
        first = "hung" if hung else f"exit codes {codes}: {find_error(directory / 'run')}"
        resize(directory, PLENTY)
        outcome = resume_stock(server, job, 2, reference=found.stock_reference)
    return f"{'hung, then ' if hung else ''}{outcome.verdict}", f"{first}; then {outcome.detail}"


@needs_root
def test_a_folder_that_turned_read_only(
    stopped: Callable[[str], Stopped], server: RankServer, tiny: Path, tmp_path: Path, record: Callable[..., None]
) -> None:
    found = stopped("zero2")
    run = create_tiny_run(tmp_path, "readonly-1", tiny, **KINDS["zero2"][0])
    with mounted(run.checkpoints, "1m", "ro", "mode=700"):
        ended = interrupt(server, run, 2)
        reason = load_attempts(run)[-1].reason or ""
    same = finish(server, run, 2) == found.reference
    record("stop", "checkpoints/ is read-only", kind="zero2", ours="stopped, same result later",
           ours_detail=reason, hung=ended.hung)  # fmt: skip
    assert not ended.hung
    assert any(ended.codes)
    assert "ead-only" in reason
    assert same


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stands_still_within_a_save_and_goes_on(
    rank: int, stopped: Callable[[str], Stopped], server: RankServer, tiny: Path, tmp_path: Path,
    record: Callable[..., None],
) -> None:  # fmt: skip
    found = stopped("zero2")
    run = create_tiny_run(tmp_path, "still-1", tiny, **KINDS["zero2"][0])

    def let_go(job: Job) -> None:
        wait_until_stopped(job.pids[rank])
        time.sleep(3)
        assert choose_checkpoint(run.checkpoints).verdicts[-1].step == 2, "not committed without that rank"
        job.kill(signal.SIGCONT, ranks=[rank])

    ended = interrupt(server, run, 2, faults={rank: [fault("on_save", 4, "SIGSTOP")]}, meanwhile=let_go)
    record("stall", f"rank {rank} stands still for 3 s in a save", kind="zero2", hung=ended.hung,
           ours="waited, same result" if ended.codes == [0, 0] else "ended")  # fmt: skip
    assert ended.codes == [0, 0], read_logs(run)
    assert hash_adapter(run) == found.reference


@pytest.mark.skipif(not LONG, reason="part of the long form: make faults")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stands_still_within_a_save_for_ever(
    rank: int, stopped: Callable[[str], Stopped], server: RankServer, tiny: Path, tmp_path: Path,
    record: Callable[..., None],
) -> None:  # fmt: skip
    """The other one's hang watch ends it, srun ends what is left, and the save is no checkpoint."""
    found = stopped("zero2")
    run = create_tiny_run(tmp_path, "stuck-1", tiny, **KINDS["zero2"][0], resume={"hang_seconds": 5})

    def wait_for_the_watch(job: Job) -> None:
        other = job.pids[1 - rank]
        deadline = time.monotonic() + LONGEST_SECONDS
        while (code := server.ask({"poll": other})["code"]) is None:
            assert time.monotonic() < deadline, read_logs(run)
            time.sleep(0.1)
        job.codes[other] = code
        job.kill(signal.SIGKILL, ranks=[rank])

    ended = interrupt(server, run, 2, faults={rank: [fault("on_save", 4, "SIGSTOP")]}, meanwhile=wait_for_the_watch)
    choice = choose_checkpoint(run.checkpoints)
    chosen = choice.chosen.name if choice.chosen else None
    same = finish(server, run, 2) == found.reference
    code = ended.codes[1 - rank]
    record("stall", f"rank {rank} stands still for ever in a save", kind="zero2", hung=code != EXIT_HANG,
           ours="ended by the hang watch, same result" if same else "other result")  # fmt: skip
    assert code == EXIT_HANG, read_logs(run)
    assert (chosen, same) == ("checkpoint-2", True)


def test_a_record_that_cannot_be_flushed_costs_every_rank_that_save(
    stopped: Callable[[str], Stopped], server: RankServer, tiny: Path, tmp_path: Path, record: Callable[..., None]
) -> None:
    """Rank 0's metrics lie for one save where fsync fails: no rank commits it, and all go on to the next."""
    found = stopped("zero2")
    run = create_tiny_run(tmp_path, "unflushed-1", tiny, **KINDS["zero2"][0])
    kept = run.directory / "kept"

    def fail_once(job: Job) -> None:
        wait_until_stopped(job.pids[0])
        run.metrics_path.rename(kept)
        run.metrics_path.symlink_to("/dev/full")
        job.kill(signal.SIGCONT, ranks=[0])
        wait_until_stopped(job.pids[0])
        kept.replace(run.metrics_path)
        job.kill(signal.SIGCONT, ranks=[0])

    stops = [fault("on_save", 4, "SIGSTOP"), fault("on_step_begin", 4, "SIGSTOP")]
    ended = interrupt(server, run, 2, faults={0: stops}, meanwhile=fail_once)
    steps = [verdict.step for verdict in choose_checkpoint(run.checkpoints).verdicts]
    log = read_logs(run)
    same = ended.codes == [0, 0] and hash_adapter(run) == found.reference
    record("stop", "rank 0's record can't be flushed at a save", kind="zero2", hung=ended.hung,
           ours="save skipped by all, same result" if same else "ended")  # fmt: skip
    assert ended.codes == [0, 0], log
    assert f"checkpoint 4 was not committed: rank 0: cannot write {run.metrics_path}: Invalid argument" in log
    assert not (run.checkpoints / "checkpoint-4").exists()
    assert (steps, same) == ([8], True)
