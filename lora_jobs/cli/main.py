"""The command line: parse, call one workflow, show one value, return a status."""

from __future__ import annotations

import gc
import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lora_jobs import __version__
from lora_jobs.cli import commands_data, commands_export, commands_init, commands_report, commands_sweep
from lora_jobs.cli.screen import clean_log, error_to_json, print_json, say, show_error, show_rows, warn
from lora_jobs.errors import ClusterError, LoraJobsError, RunError, SpecError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_jobs.workflows.submitting import SubmitReport

EXIT_BUG = 1
EXIT_NOT_FITTING = 3
EXIT_RUN = 5
EXIT_INTERRUPTED = 130

app = typer.Typer(
    help="One YAML job spec to a finished, verified LoRA adapter on a Slurm cluster.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="the job spec, a YAML file")]
JobName = Annotated[
    str | None,
    typer.Argument(metavar="JOB", help="any Slurm id the run ever had, its name or its directory; none: the last"),
]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="beats the file")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, nothing else")]
Cluster = Annotated[
    Literal["auto", "slurm", "local"], typer.Option("--cluster", help="where it runs; auto: Slurm if it is here")
]
Force = Annotated[bool, typer.Option("--force", help="go on although the estimate says it does not fit")]


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    """Options of the program itself; without a command, the help."""
    if version:
        say(f"lora-jobs {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        say(context.get_help())


app.command()(commands_init.init)


def _type_again(command: str, spec: Path, overrides: Sequence[str] | None) -> str:
    """The command line that means the same spec and values."""
    settings = (word for override in overrides or () for word in ("--set", override))
    return shlex.join(["lora-jobs", command, str(spec), *settings])


@app.command()
def check(
    spec: SpecPath,
    overrides: Overrides = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="also trace the real training code (no GPU needed; half a minute)")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Validate a spec, estimate memory per GPU, say what would make it fit."""
    from lora_jobs.cli.show_check import show_check
    from lora_jobs.workflows.checking import check_job

    report = check_job(spec, overrides or (), exact=exact)
    if as_json:
        print_json(report.to_json())
    else:
        show_check(report, _type_again("check", spec, overrides))
    if not report.fits:
        raise typer.Exit(EXIT_NOT_FITTING)


@app.command()
def schema(_as_json: AsJson = True) -> None:
    """Print the JSON Schema of job specs, for editors; it is JSON with --json and without."""
    from lora_jobs.spec import build_schema

    print_json(build_schema())


@app.command()
def render(
    spec: SpecPath,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="write the files here too")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the sbatch script; with -o write it and the DeepSpeed JSON. Submits nothing."""
    from lora_jobs.workflows.submitting import render_job, write_rendered

    rendered = render_job(spec, overrides or ())
    written = write_rendered(rendered.plan, output) if output else ()
    if as_json:
        print_json({**rendered.plan.to_json(), "written": [str(path) for path in written]})
        return
    sys.stdout.write(rendered.plan.script)
    for path in written:
        warn(f"wrote {path}", style="")


@app.command()
def plan(spec: SpecPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Compare partitions and numbers of GPUs: fits, expected start and finish, GPU-hours. Submits nothing."""
    from lora_jobs.cli.show_plan import show_plan, show_question
    from lora_jobs.workflows.planning import plan_spec

    found = plan_spec(spec, overrides or (), progress=None if as_json else show_question)
    if as_json:
        print_json(found.to_json())
    else:
        show_plan(found, _type_again("submit", spec, overrides))


@app.command()
def submit(
    spec: SpecPath,
    overrides: Overrides = None,
    cluster: Cluster = "auto",
    row: Annotated[str | None, typer.Option("--plan", metavar="ROW", help="as this row of `plan` has it")] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option("--sweep", metavar="SECTION.KEY=V,V", help="one run per value (of several: per combination)"),
    ] = None,
    throttle: Annotated[
        int | None, typer.Option("--throttle", min=1, metavar="N", help="of a sweep N tasks at once, sbatch's %N")
    ] = None,
    skip_unfit: Annotated[bool, typer.Option("--skip-unfit", help="of a sweep only what fits")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="stay until the run ends, and show its progress")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the plan that would be sent; send nothing")] = False,
    force: Force = False,
    reuse: Annotated[bool, typer.Option("--reuse", help="show a finished run of this very spec instead")] = False,
    as_json: AsJson = False,
) -> None:
    """Check, preflight and submit; print the job id. A sweep becomes one Slurm array."""
    from lora_jobs.workflows.sweeping import SweepReport, submit_spec

    settings = list(overrides or ())
    if row is not None:
        from lora_jobs.workflows.planning import find_row_overrides

        settings += find_row_overrides(spec, settings, row)
    sent = submit_spec(
        spec,
        settings,
        sweep=sweep or (),
        throttle=throttle,
        cluster=cluster,
        force=force,
        skip_unfit=skip_unfit,
        dry_run=dry_run,
        reuse=reuse,
    )
    if isinstance(sent, SweepReport):
        commands_sweep.show_sent(sent, wait=wait, as_json=as_json)
    else:
        _show_sent(sent, wait=wait, as_json=as_json)


@app.command()
def status(
    job: JobName = None,
    everything: Annotated[bool, typer.Option("--all", help="all runs, not only the newest twenty")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="look again, every 10 s at the most, until all ended")] = False,
    user: Annotated[
        str | None, typer.Option("--user", metavar="NAME", help="also this user's other jobs in the queue")
    ] = None,
    partition: Annotated[str | None, typer.Option("--partition", metavar="NAME", help="only in this partition")] = None,
    as_json: AsJson = False,
) -> None:
    """Show my runs: state, reason in plain words, priority, rank, expected start, progress. With JOB: one page."""
    if job and (user or partition):
        option = "--user" if user else "--partition"
        raise SpecError(f"{option} chooses among runs, JOB names one: they don't go together", hint="leave one out")
    if watch:
        from lora_jobs.cli import show_status
        from lora_jobs.workflows.observing import find_status
        from lora_jobs.workflows.watching import watch_status

        if as_json:
            raise SpecError("--watch redraws, --json is one document", hint="call --json as often as you like")
        look = partial(find_status, job, everything=everything, user=user, partition=partition, factors=False)
        show_status.watch_status(watch_status(look))
    elif job:
        if commands_sweep.show_page(job, as_json=as_json):
            return
        from lora_jobs.cli.show_page import show_page
        from lora_jobs.workflows.detailing import describe_run

        page = describe_run(job)
        print_json(page.to_json()) if as_json else show_page(page)
    else:
        from lora_jobs.cli.show_status import show_status as show_report
        from lora_jobs.workflows.observing import find_status

        report = find_status(everything=everything, user=user, partition=partition, factors=as_json)
        print_json(report.to_json()) if as_json else show_report(report)


@app.command()
def why(job: JobName = None, as_json: AsJson = False) -> None:
    """Say why a job waits, or ended: the reason in plain words, its numbers, what can be done."""
    from lora_jobs.cli.show_page import show_why
    from lora_jobs.workflows.explaining import explain_job

    answer = explain_job(job)
    print_json(answer.to_json()) if as_json else show_why(answer)


@app.command()
def resume(
    job: JobName = None,
    overrides: Overrides = None,
    cluster: Cluster = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="verify and explain; start nothing")] = False,
    from_scratch: Annotated[bool, typer.Option("--from-scratch", help="start over from the base model")] = False,
    allow_drift: Annotated[
        list[str] | None, typer.Option("--allow-drift", metavar="KEY", help="a changed key of the spec that is meant")
    ] = None,
    accept_unverified: Annotated[
        bool, typer.Option("--accept-unverified", help="also take a checkpoint without a manifest")
    ] = False,
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=1, help="go on with this many processes and the same global batch")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="stay until the run ends, and show its progress")] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Verify the checkpoints, choose the newest good one, explain, continue; of a sweep every task that stopped."""
    plain = not overrides and not allow_drift and not from_scratch and cluster == "auto"
    if commands_sweep.resume(job, plain=plain, dry_run=dry_run, force=force, wait=wait, as_json=as_json):
        return
    from lora_jobs.cli.show import show_resume
    from lora_jobs.workflows.resuming import plan_resume, resume_run

    plan = plan_resume(
        job,
        overrides or (),
        allow_drift=allow_drift or (),
        from_scratch=from_scratch,
        accept_unverified=accept_unverified,
        gpus=gpus,
        cluster=cluster,
        force=force,
    )
    if not as_json:
        show_resume(plan)
    if plan.finished or plan.pending or dry_run:
        if as_json:
            print_json(plan.to_json())
        return
    sent = resume_run(plan, cluster=cluster, force=force)
    _show_sent(sent, wait=wait, as_json=as_json)


def _show_sent(sent: SubmitReport, *, wait: bool, as_json: bool) -> None:
    from lora_jobs.cli.show import show_submission

    if as_json:
        print_json(sent.to_json())
    else:
        show_submission(sent)
    if sent.run is None or not (wait or sent.reused):
        return
    from lora_jobs.cli.show_runs import show_outcome, show_progress
    from lora_jobs.workflows.following import follow_run
    from lora_jobs.workflows.results import load_outcome

    final = show_progress(follow_run(sent.run), quiet=as_json or sent.reused)
    if not as_json:
        show_outcome(sent.run, final, load_outcome(sent.run))
    if final.state != "COMPLETED":
        raise typer.Exit(EXIT_RUN)


@app.command()
def verify(
    target: Annotated[str | None, typer.Argument(metavar="PATH|JOB")] = None,
    level: Annotated[int, typer.Option("--level", min=0, max=3, help="0 sizes, 1 structure, 2 hashes, 3 meaning")] = 2,
    as_json: AsJson = False,
) -> None:
    """Give a verdict per checkpoint, with the reason."""
    from lora_jobs.cli.show import show_verdicts
    from lora_jobs.workflows.verifying import verify_path_or_run

    verdicts = verify_path_or_run(target, level=level)
    if as_json:
        print_json({"checkpoints": [verdict.to_json() for verdict in verdicts]})
    else:
        show_verdicts(verdicts)
    if not all(verdict.good for verdict in verdicts):
        raise typer.Exit(EXIT_RUN)


@app.command()
def logs(
    job: JobName = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on until the run ends")] = False,
) -> None:
    """Print the log of the newest attempt."""
    from lora_jobs.workflows.following import read_log

    for text in read_log(job, follow=follow):
        sys.stdout.write(clean_log(text))
        sys.stdout.flush()


@app.command()
def cancel(job: JobName = None) -> None:
    """Stop a run, or all runs of a sweep; what is committed stays."""
    from lora_jobs.workflows.following import cancel_run

    if commands_sweep.cancel(job):
        return
    stopped = cancel_run(job)
    say(f"cancelled {stopped.run} (job {stopped.job_id}); its checkpoints stay")
    say(f"next: lora-jobs status {stopped.run} · lora-jobs resume {stopped.run}")


@app.command()
def models(as_json: AsJson = False) -> None:
    """List the models whose shape is known, with parameter counts."""
    from lora_jobs.workflows.listing import list_models

    show_rows("models", list_models(), as_json=as_json)


@app.command()
def gpus(as_json: AsJson = False) -> None:
    """List the GPU types that jobs are sized for."""
    from lora_jobs.workflows.listing import list_gpus

    show_rows("gpus", list_gpus(), as_json=as_json)


@app.command()
def doctor(
    cluster: Annotated[
        str | None, typer.Option("--cluster", metavar="NAME", help="the environment to look at; none: this cluster's")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look at Slurm, partitions, accounts, disk, the job's packages and the model cache: what is right, what is not."""
    from lora_jobs.cli.show_doctor import show_diagnosis
    from lora_jobs.workflows.diagnosing import diagnose

    diagnosis = diagnose(cluster)
    if as_json:
        print_json(diagnosis.to_json())
    else:
        show_diagnosis(diagnosis)
    if diagnosis.worst == "wrong":
        raise typer.Exit(ClusterError.exit_code)


app.command("data")(commands_data.preview_data)
app.command("fetch")(commands_data.fetch)


clusters = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
app.add_typer(clusters, name="clusters")


@clusters.callback()
def list_clusters(context: typer.Context, as_json: AsJson = False) -> None:
    """List the environments (envs/) and their partitions; `clusters init NAME` writes one."""
    if context.invoked_subcommand is not None:
        return
    from lora_jobs.workflows.listing import list_partitions

    rows, errors = list_partitions()
    if as_json:
        print_json({"clusters": rows, "errors": [error_to_json(error) for error in errors]})
    else:
        show_rows("clusters", rows, as_json=False)
    for error in errors:
        show_error(error)
    if errors:
        raise typer.Exit(SpecError.exit_code)


@clusters.command("init")
def init_environment(
    name: Annotated[str, typer.Argument(metavar="NAME", help="the cluster's name, as resources.cluster will say it")],
    as_json: AsJson = False,
) -> None:
    """Write a first envs/NAME.yaml from what Slurm says of this cluster."""
    from lora_jobs.workflows.describing import init_cluster

    path, environment, remarks = init_cluster(name)
    if as_json:
        print_json({"file": str(path), "environment": environment.to_values(), "remarks": list(remarks)})
        return
    say(f"wrote {path}: {len(environment.partitions)} partitions")
    for remark in remarks:
        say(f"check: {remark}", "yellow")
    say(f"next: look at it, then lora-jobs check SPEC --set resources.cluster={name}")


app.command()(commands_sweep.compare)
app.command()(commands_report.report)
app.command()(commands_export.export)


def run() -> None:
    """The command of sys.argv: every error that reaches a user passes here."""
    _keep_command(sys.argv[1:2])
    try:
        status_code = app(standalone_mode=False)
        if status_code == EXIT_INTERRUPTED:  # typer's own word for Ctrl-C
            raise KeyboardInterrupt
    except LoraJobsError as error:
        status_code = _report(error)
    except typer.TyperException as error:
        status_code = _report(SpecError(error.format_message(), hint="lora-jobs --help, lora-jobs COMMAND --help"))
    except (KeyboardInterrupt, typer.Abort):
        warn("interrupted; a job that was submitted goes on: lora-jobs status")
        status_code = EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status_code = 0
    except OSError as error:
        status_code = _report(_describe_failure(error))
    except Exception as error:  # noqa: BLE001 - the last stop before the user
        status_code = _report_bug(error)
    gc.freeze()  # a tenth of a second: at exit the interpreter would go through every object again, and again
    raise SystemExit(status_code or 0)


def _describe_failure(error: OSError) -> RunError:
    """What the system refused; a working directory that was deleted is no path that an error could name."""
    try:
        Path.cwd()
    except OSError:
        message = "the directory that this shell is in does not exist any more"
        return RunError(message, hint="cd to one that does, and try again")
    where = f"{error.filename}: " if error.filename else ""
    return RunError(f"{where}{error.strerror or error}")


def _keep_command(first: list[str]) -> None:
    """Leave typer the one command that is asked for by its name: to build all of them takes it 0.03 s."""
    named = [known for known in app.registered_commands if known.callback and [known.callback.__name__] == first]
    if named:
        app.registered_commands, app.registered_groups = named, []


def _report(error: LoraJobsError) -> int:
    """The error on stderr, and with --json as the one document on stdout; returns its exit code."""
    if "--json" in sys.argv:
        print_json(error_to_json(error))
    show_error(error)
    return error.exit_code


def _report_bug(error: Exception) -> int:
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile("w", prefix="lora-jobs-", suffix=".log", delete=False, encoding="utf-8") as file:
        file.write(f"lora-jobs {__version__}: {' '.join(sys.argv[1:])}\n\n{traceback.format_exc()}")
    warn(
        f"error: this is a bug in lora-jobs: {type(error).__name__}: {error}; details in {file.name}", style="bold red"
    )
    return EXIT_BUG
