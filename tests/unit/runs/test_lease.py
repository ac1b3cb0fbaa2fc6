"""One writer at a time; a writer that vanished holds nobody up for long."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import asdict

from lora_jobs.errors import RunError
from lora_jobs.runs import Run, create_run, load_lease, release_lease, renew_lease, take_lease

if TYPE_CHECKING:
    from pathlib import Path

TAKE = """
import sys, time
from pathlib import Path
from lora_jobs.runs import Run, take_lease
take_lease(Run(Path(sys.argv[1])), job_id="5", restart_count=0)
print("taken", flush=True)
time.sleep(float(sys.argv[2]))
"""
# Has the kernel answer flock as Lustre does where it is mounted without -o flock, for this process alone.
WITHOUT_LOCKS = """
import ctypes, errno, struct, sys
from pathlib import Path
from lora_jobs.errors import RunError
from lora_jobs.runs import Run, take_lease
from lora_jobs.runs.lease import hold_run

FLOCK = int(sys.argv[2])
rows = (0x20, 0, 0, 0), (0x15, 0, 1, FLOCK), (0x06, 0, 0, 0x50000 | errno.ENOSYS), (0x06, 0, 0, 0x7FFF0000)
code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *row) for row in rows))

class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

libc = ctypes.CDLL(None)
program = Program(len(rows), ctypes.addressof(code))
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(program), 0, 0):
    sys.exit("no seccomp here")
run = Run(Path(sys.argv[1]))
for take in (lambda: take_lease(run, job_id="5", restart_count=0), hold_run(run).__enter__):
    try:
        take()
    except RunError as error:
        print(error.message, error.hint, sep="; ")
"""
FLOCK = {"x86_64": 73, "aarch64": 32}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return create_run(tmp_path, "tiny-1", {"spec.yaml": "name: tiny\n"})


def hold(run: Run, **changes: object) -> None:
    """A lease as another process, job or machine would have left it."""
    lease = take_lease(run, job_id="5", restart_count=0)
    (run.directory / "lease.json").write_text(json.dumps({**asdict(lease), **changes}))


def test_a_living_process_of_this_machine_is_refused_at_once(run: Run) -> None:
    process = subprocess.Popen([sys.executable, "-c", TAKE, str(run.directory), "60"], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"taken\n"
        with pytest.raises(RunError, match=rf"is being trained by job 5 on .* \(process {process.pid}\)"):
            take_lease(run, job_id="6", restart_count=0)
    finally:
        process.kill()
        process.wait()
        process.stdout.close() if process.stdout else None
    assert take_lease(run, job_id="6", restart_count=0).job_id == "6"


def test_the_next_start_of_the_same_job_takes_over(run: Run) -> None:
    hold(run, host="lrdn0001")
    assert take_lease(run, job_id="5", restart_count=1).restart_count == 1


def test_a_silent_holder_elsewhere_is_waited_for(run: Run) -> None:
    hold(run, host="lrdn0001")
    began = time.monotonic()
    assert take_lease(run, job_id="6", restart_count=0, stale_seconds=1.0).job_id == "6"
    assert time.monotonic() - began >= 0.9


def test_a_holder_that_was_silent_for_long_is_not_waited_for(run: Run) -> None:
    hold(run, host="lrdn0001")
    os.utime(run.directory / "lease.json", (0, 0))
    assert take_lease(run, job_id="6", restart_count=0).job_id == "6"


def test_a_holder_elsewhere_that_renews_is_refused(run: Run) -> None:
    hold(run, host="lrdn0001")
    timer = threading.Timer(0.5, os.utime, [run.directory / "lease.json"])
    timer.start()
    with pytest.raises(RunError, match="is being trained by job 5 on lrdn0001"):
        take_lease(run, job_id="6", restart_count=0, stale_seconds=60.0)
    timer.join()


def test_who_lost_the_lease_is_told_and_gives_back_nothing(run: Run) -> None:
    first = take_lease(run, job_id="5", restart_count=0)
    assert renew_lease(run, first)
    second = take_lease(run, job_id="5", restart_count=1)
    assert not renew_lease(run, first)
    release_lease(run, first)
    assert load_lease(run) == second
    release_lease(run, second)
    assert load_lease(run) is None


def test_a_torn_lease_is_no_lease(run: Run) -> None:
    (run.directory / "lease.json").write_text('{"job_id": "5", ')
    assert take_lease(run, job_id="6", restart_count=0).job_id == "6"


@pytest.mark.skipif(platform.machine() not in FLOCK, reason="the number of flock is known for x86_64 and aarch64")
def test_a_file_system_without_locks_is_said_in_words(run: Run) -> None:
    command = [sys.executable, "-c", WITHOUT_LOCKS, str(run.directory), str(FLOCK[platform.machine()])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.stderr == "no seccomp here\n":
        pytest.skip("this machine grants no seccomp filter")
    assert done.stderr == ""
    hint = "the file system has no locks (Lustre mounted without -o flock): set LORA_JOBS_HOME to a directory elsewhere"
    assert done.stdout.splitlines() == [
        f"cannot lock {run.directory}/{name}: Function not implemented; {hint}" for name in (".lease.lock", ".lock")
    ]
