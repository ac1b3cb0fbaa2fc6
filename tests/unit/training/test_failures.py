from __future__ import annotations

import errno
import subprocess
import sys

import pytest

from lora_jobs.errors import CheckpointError, SpecError
from lora_jobs.training.failures import Failure, classify_failure


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (SpecError("r is 0", hint="raise it"), Failure("r is 0 (next: raise it)", 2, traceback=False)),
        (CheckpointError("cut short"), Failure("cut short", 5, traceback=False)),
        (KeyboardInterrupt(), Failure("interrupted (SIGINT)", 130, traceback=False)),
        (
            OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"),
            Failure(
                "the GPU is out of memory: CUDA out of memory. Tried to allocate 2 GiB "
                "(next: `lora-jobs check` on the spec names what to lower)",
                1,
                traceback=False,
            ),
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "/scratch/x"),
            Failure("no space left for /scratch/x: No space left on device", 5, traceback=False),
        ),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            Failure(
                "torch is not installed in the job's environment (next: pip install 'lora-jobs[train]')",
                1,
                traceback=False,
            ),
        ),
        (ZeroDivisionError("division by zero"), Failure("ZeroDivisionError: division by zero", 1, traceback=True)),
    ],
)
def test_a_failure_is_one_line_and_a_status(error: BaseException, failure: Failure) -> None:
    assert classify_failure(error) == failure


def test_a_lost_rank_is_not_taken_for_the_cause() -> None:
    error = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:29411")
    assert classify_failure(error).secondary
    assert not classify_failure(ValueError("wrong")).secondary


def test_entry_and_attempt_are_imported_without_the_training_stack() -> None:
    code = (
        "import sys, lora_jobs.training.entry, lora_jobs.training.attempt;"
        "print(sorted({'torch', 'transformers', 'peft', 'deepspeed', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
