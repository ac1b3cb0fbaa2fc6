"""The one door to other programs: run one and wait, or start one that outlives this process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING

from msgspec import Struct

from lora_jobs.errors import CommandError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

# Set by Slurm or a launcher inside a job, or by a user for one command's output: none of it may leak into another job
# or change the columns we read. SCANCEL_INTERACTIVE would even wait for an answer.
_DROPPED_PREFIXES = (
    "SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SACCT_", "SPRIO_", "SINFO_", "SCANCEL_",
    "SUBMITIT_", "PMI_", "PMIX_", "OMPI_", "TORCHELASTIC_",
)  # fmt: skip
_DROPPED = frozenset({
    "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK",
    "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME",
})  # fmt: skip
_KEPT = frozenset({"SLURM_CONF"})


class CompletedCommand(Struct, frozen=True):
    """What a program said and how it ended."""

    argv: tuple[str, ...]
    stdout: str
    stderr: str
    returncode: int


def find_command(name: str) -> str | None:
    """Full path of the program `name` on PATH, or None."""
    return shutil.which(name)


def clean_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment without what an enclosing job or launcher left in it; SLURM_CONF stays."""
    given = os.environ if environment is None else environment
    return {
        name: value
        for name, value in given.items()
        if name in _KEPT or not (name in _DROPPED or name.startswith(_DROPPED_PREFIXES))
    }


def find_query_seconds() -> float:
    """Seconds that one question to Slurm may take: LORA_JOBS_QUERY_SECONDS, else 60. Errors: CommandError.

    A command gives up by itself on a controller that is gone after about 40 s (measured, 22.05).
    """
    given = os.environ.get("LORA_JOBS_QUERY_SECONDS") or "60"
    if not given.isdecimal() or not int(given):
        raise CommandError(f"LORA_JOBS_QUERY_SECONDS is {given!r}, wanted whole seconds, such as 60")
    return float(given)


def run_command(
    argv: Sequence[str],
    *,
    timeout: float,
    input: str | None = None,  # noqa: A002
    env: Mapping[str, str] | None = None,
) -> CompletedCommand:
    """Run a program to its end, at most `timeout` seconds; whatever its exit status, that is returned.

    `env` is the whole environment, by default `clean_environment()`. Errors: CommandError when the program is not
    there, can't be started, or does not end in time (it and its children are then killed).
    """
    command = tuple(argv)
    try:
        process = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(clean_environment() if env is None else env),
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise CommandError(
            f"{command[0]} is not on PATH", command=command, hint="is this a login node of the cluster?"
        ) from error
    except OSError as error:
        raise CommandError(f"{command[0]} can't be started: {error.strerror}", command=command) from error
    with process:
        try:
            stdout, stderr = process.communicate(input, timeout)
        except subprocess.TimeoutExpired as error:
            _kill_session(process)
            raise CommandError(
                f"{command[0]} did not answer within {timeout:.0f} s",
                command=command,
                hint="the cluster may be busy or down: try again in a minute",
            ) from error
        except BaseException:
            _kill_session(process)
            raise
    return CompletedCommand(command, stdout, stderr, process.returncode)


def _kill_session(process: subprocess.Popen[str]) -> None:
    """Kill the program and its children: a child that lives on would keep our pipes open."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()


def start_detached(argv: Sequence[str], *, env: Mapping[str, str], log: Path) -> int:
    """Start a program that neither Ctrl-C, nor a closed terminal, nor our end stops; returns its pid.

    It gets a session of its own, no input, and `log` for its output. Errors: CommandError.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    program = find_command(argv[0])
    if program is None:
        raise CommandError(f"{argv[0]} is not there or can't be run", command=argv)
    try:
        return os.posix_spawn(program, list(argv), dict(env), file_actions=actions, setsid=True)
    except OSError as error:
        raise CommandError(f"{argv[0]} can't be started: {error.strerror}", command=argv) from error
