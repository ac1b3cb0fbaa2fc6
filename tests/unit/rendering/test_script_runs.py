"""The rendered script, really run by bash; srun, scontrol and Python are fakes on PATH."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from lora_jobs.runs import EXIT_SAVED

Render = Callable[..., str]

BEGIN = "python [-P] [-m] [lora_jobs.training.attempt] [begin] [{run}]"
END = "python [-P] [-m] [lora_jobs.training.attempt] [end] [{run}] [{code}]"
SRUN = (
    "srun [--kill-on-bad-exit=0] [--wait=60] [--cpus-per-task=1] [--open-mode=append]"
    " [--output={logs}/attempt-{attempt}.out] [--error={logs}/attempt-{attempt}.err]"
    ' [bash] [-c] [trap "" TERM USR2; exec "$@"] [rank]'
    " [{python}] [-P] [-u] [-m] [submitit.core._submit] [{run}/submitit]"
)
HOSTS = "scontrol [show] [hostnames] [node[1-2]]"
SHOW = "scontrol [show] [job] [-o] [{job}]"
EXCLUDE = "scontrol [update] [JobId={job}] [ExcNodeList=node2,node3]"
REQUEUE = "scontrol [requeue] [{job}]"


def _expected(cluster, *lines: str, **values: str) -> list[str]:
    run = str(cluster.run)
    given = {"run": run, "logs": f"{run.replace('%', '%%')}/logs", "python": cluster.python, "attempt": "1", "job": "7"}
    return [line.format(**{**given, **values}) for line in lines]


def test_a_job_that_finishes(fake_cluster, render: Render) -> None:
    ended = fake_cluster.execute(render(run=fake_cluster.run, python=fake_cluster.python))
    assert ended.calls == _expected(fake_cluster, SHOW, HOSTS, BEGIN, SRUN, END, code="0")
    assert ended.code == 0
    assert list(fake_cluster.scratch.iterdir()) == [], "the private cache is removed"


def test_a_saved_stop_is_requeued_once(fake_cluster, render: Render) -> None:
    ended = fake_cluster.execute(
        render(run=fake_cluster.run, python=fake_cluster.python), FAKE_SRUN_CODE="85", FAKE_ATTEMPT="12"
    )
    assert ended.calls == _expected(fake_cluster, SHOW, HOSTS, BEGIN, SRUN, END, SHOW, REQUEUE, code="85", attempt="12")
    assert ended.code == 85


PAUSES = [f"sleep [{seconds}]" for seconds in (2, 5, 10, 20, 30)]


@pytest.mark.parametrize("away", [1, 5])
def test_a_controller_that_is_away_for_a_minute_does_not_cost_the_requeue(
    fake_cluster, render: Render, away: int
) -> None:
    """slurmctld restarts while the ranks save: it is asked again."""
    script = render(run=fake_cluster.run, python=fake_cluster.python)
    ended = fake_cluster.execute(script, FAKE_SRUN_CODE="85", FAKE_AWAY=f"{away}")
    asked = [line for pause in PAUSES[:away] for line in (SHOW, pause)]
    assert ended.calls == _expected(fake_cluster, SHOW, HOSTS, BEGIN, SRUN, END, *asked, SHOW, REQUEUE, code="85")


def test_a_controller_that_stays_away_is_told(fake_cluster, render: Render) -> None:
    script = render(run=fake_cluster.run, python=fake_cluster.python)
    ended = fake_cluster.execute(script, FAKE_SRUN_CODE="85", FAKE_AWAY="99")
    asked = [line for pause in PAUSES for line in (SHOW, pause)]
    assert ended.calls == _expected(fake_cluster, SHOW, HOSTS, BEGIN, SRUN, END, *asked, SHOW, code="85")
    assert ended.code == 85
    assert "lora-jobs: Slurm does not answer: lora-jobs resume 7 continues job 7" in ended.log


@pytest.mark.parametrize("fails", [1, 99])
def test_a_save_is_requeued_though_its_end_cannot_be_written_down(fake_cluster, render: Render, fails: int) -> None:
    """A full disk: the end is written once there is room again; the code of a save asks for a requeue in any case."""
    script = render(run=fake_cluster.run, python=fake_cluster.python)
    ended = fake_cluster.execute(script, FAKE_SRUN_CODE=f"{EXIT_SAVED}", FAKE_END_FAILS=f"{fails}")
    tries = [END, *[line for pause in PAUSES[:fails] for line in (pause, END)]]
    assert ended.calls == _expected(fake_cluster, SHOW, HOSTS, BEGIN, SRUN, *tries, SHOW, REQUEUE, code=f"{EXIT_SAVED}")


def test_another_end_that_cannot_be_written_down_is_not_requeued(fake_cluster, render: Render) -> None:
    script = render(run=fake_cluster.run, python=fake_cluster.python)
    ended = fake_cluster.execute(script, FAKE_SRUN_CODE="1", FAKE_END_FAILS="99")
    tries = [END, *[line for pause in PAUSES for line in (pause, END)]]
    assert ended.calls == _expected(fake_cluster, SHOW, HOSTS, BEGIN, SRUN, *tries, code="1")
    assert ended.code == 1


def test_a_node_that_failed_is_taken_off_the_list_once_the_job_waits_again(fake_cluster, render: Render) -> None:
    script = render(run=fake_cluster.run, python=fake_cluster.python)
    ended = fake_cluster.execute(script, FAKE_SRUN_CODE="1", FAKE_END="requeue node2,node3")
    assert ended.calls == _expected(fake_cluster, SHOW, HOSTS, BEGIN, SRUN, END, SHOW, REQUEUE, EXCLUDE, code="1")


@pytest.mark.parametrize(("requeue", "can"), [("0", "no"), ("1", "yes")])
def test_at_its_start_a_job_says_whether_it_can_come_back(fake_cluster, render: Render, requeue: str, can: str) -> None:
    ended = fake_cluster.execute(render(run=fake_cluster.run, python=fake_cluster.python), FAKE_REQUEUE=requeue)
    assert ended.srun_environment["LORA_JOBS_CAN_REQUEUE"] == can
    assert ("does not requeue job 7: lora-jobs resume 7" in ended.log) == (can == "no")


def test_the_ranks_know_when_their_time_is_over(fake_cluster, render: Render) -> None:
    script = render(run=fake_cluster.run, python=fake_cluster.python)
    assert fake_cluster.execute(script, TZ="UTC").srun_environment["LORA_JOBS_END_TIME"] == "1763681530"
    endless = fake_cluster.execute(script, FAKE_END_TIME="Unknown")
    assert "LORA_JOBS_END_TIME" not in endless.srun_environment


def test_no_core_file_is_left_in_the_users_quota(fake_cluster, render: Render) -> None:
    script = render(run=fake_cluster.run, python=fake_cluster.python)
    ended = fake_cluster.execute(script.replace("\nexit ", "\necho core $(ulimit -c)\nexit "))
    assert "core 0" in ended.log


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "TIMEOUT", "PREEMPTED", "FAILED", ""])
def test_a_job_that_no_longer_runs_is_never_requeued(fake_cluster, render: Render, state: str) -> None:
    ended = fake_cluster.execute(
        render(run=fake_cluster.run, python=fake_cluster.python), FAKE_SRUN_CODE="85", FAKE_STATE=state
    )
    assert ended.calls == _expected(fake_cluster, SHOW, HOSTS, BEGIN, SRUN, END, SHOW, code="85")
    assert ended.code == 85
    assert "lora-jobs resume 7" in ended.log


def test_a_task_of_an_array_is_requeued_by_its_own_name(fake_cluster, render: Render) -> None:
    ended = fake_cluster.execute(
        render(run=fake_cluster.run, python=fake_cluster.python),
        FAKE_SRUN_CODE="85",
        SLURM_ARRAY_JOB_ID="5",
        SLURM_ARRAY_TASK_ID="2",
    )
    assert ended.calls == _expected(fake_cluster, SHOW, HOSTS, BEGIN, SRUN, END, SHOW, REQUEUE, code="85", job="5_2")


@pytest.mark.parametrize("code", ["1", "137", "143"])
def test_a_failure_keeps_its_code_and_is_not_requeued(fake_cluster, render: Render, code: str) -> None:
    ended = fake_cluster.execute(render(run=fake_cluster.run, python=fake_cluster.python), FAKE_SRUN_CODE=code)
    assert ended.calls == _expected(fake_cluster, SHOW, HOSTS, BEGIN, SRUN, END, code=code)
    assert ended.code == int(code)


def test_no_good_checkpoint_starts_no_training(fake_cluster, render: Render) -> None:
    ended = fake_cluster.execute(render(run=fake_cluster.run, python=fake_cluster.python), FAKE_BEGIN_CODE="86")
    assert ended.calls == _expected(fake_cluster, SHOW, HOSTS, BEGIN)
    assert ended.code == 86


@pytest.mark.parametrize("answer", ["", "not a number", "1/../../x"])
def test_an_attempt_that_is_no_number_starts_no_training(fake_cluster, render: Render, answer: str) -> None:
    ended = fake_cluster.execute(render(run=fake_cluster.run, python=fake_cluster.python), FAKE_ATTEMPT=answer)
    assert ended.calls == _expected(fake_cluster, SHOW, HOSTS, BEGIN)
    assert ended.code == 1


@pytest.mark.parametrize("code", ["0", "85", "3"])
def test_the_shell_outlives_sigterm_and_returns_sruns_code(fake_cluster, render: Render, code: str) -> None:
    ended = fake_cluster.execute_with_signals(
        render(run=fake_cluster.run, python=fake_cluster.python),
        [signal.SIGTERM, signal.SIGCONT, signal.SIGTERM],
        FAKE_SRUN_CODE=code,
    )
    requeue = (SHOW, REQUEUE) if code == "85" else ()
    assert ended.calls == _expected(fake_cluster, SHOW, HOSTS, BEGIN, SRUN, END, *requeue, code=code)
    assert ended.code == int(code)


def test_usr2_for_the_shell_alone_is_passed_on(fake_cluster, render: Render) -> None:
    ended = fake_cluster.execute_with_signals(
        render(run=fake_cluster.run, python=fake_cluster.python), [signal.SIGUSR2], FAKE_SRUN_CODE="85"
    )
    assert ended.calls == _expected(
        fake_cluster, SHOW, HOSTS, BEGIN, SRUN, "srun got USR2", END, SHOW, REQUEUE, code="85"
    )
    assert ended.code == 85


def test_what_the_ranks_find_in_their_environment(fake_cluster, render: Render) -> None:
    script = render(
        "resources.cpus_per_task=4",
        run=fake_cluster.run,
        python=fake_cluster.python,
        environment={"HF_HUB_OFFLINE": "1", "GREETING": "it's $HOME"},
    )
    found = fake_cluster.execute(script, SLURM_RESTART_COUNT="3").srun_environment
    scratch = found.pop("TORCH_EXTENSIONS_DIR").removesuffix("/torch_extensions")
    wanted = {
        "OMP_NUM_THREADS": "4",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "GREETING": "it's $HOME",
        "SUBMITIT_EXECUTOR": "slurm",
        "LORA_JOBS_RUN": str(fake_cluster.run),
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "10115",
        "TRITON_CACHE_DIR": f"{scratch}/triton",
    }
    assert {name: found.get(name) for name in wanted} == wanted
    assert scratch.startswith(f"{fake_cluster.scratch}/lora-jobs-7.")


def test_jobs_and_attempts_meet_at_other_ports(fake_cluster, render: Render) -> None:
    script = render(run=fake_cluster.run, python=fake_cluster.python)
    ports = set()
    for job, restarts in (("7", "0"), ("7", "1"), ("8", "0"), ("99999999", "2")):
        ended = fake_cluster.execute(script, SLURM_JOB_ID=job, SLURM_RESTART_COUNT=restarts)
        ports.add(int(ended.srun_environment["MASTER_PORT"]))
    assert len(ports) == 4
    assert all(10_000 <= port < 30_000 for port in ports)


def test_a_missing_tmpdir_is_no_reason_to_fail(fake_cluster, render: Render) -> None:
    ended = fake_cluster.execute(
        render(run=fake_cluster.run, python=fake_cluster.python), TMPDIR="/nowhere/of/the/login/node"
    )
    assert ended.code == 0
    assert ended.srun_environment["TRITON_CACHE_DIR"].startswith("/tmp/lora-jobs-7.")  # noqa: S108


def test_a_module_that_does_not_load_ends_the_job(fake_cluster, render: Render) -> None:
    module = fake_cluster.binaries / "module"
    module.write_text('#!/bin/bash\n# A fake, for tests.\necho "module $*" >> "$FAKE_CALLS"\n[[ $2 != absent/1 ]]\n')
    module.chmod(0o755)
    script = render(run=fake_cluster.run, python=fake_cluster.python, modules=["cuda/12.1", "absent/1", "never/2"])
    ended = fake_cluster.execute(script)
    assert ended.calls == ["module load cuda/12.1", "module load absent/1"]
    assert ended.code == 1
