"""`init`: a first spec, from flags, or from questions where somebody sits at the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_jobs.cli.screen import say, show_error
from lora_jobs.errors import LoraJobsError, SpecError
from lora_jobs.units import format_gib

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_jobs.workflows.starting import Answers, Started


def init(
    name: Annotated[Path, typer.Argument(metavar="[NAME]", help="the job's name; the file is NAME.yaml")] = Path("job"),
    model: Annotated[str | None, typer.Option("--model", help="a Hub id, a name of `models`, or a directory")] = None,
    data: Annotated[str | None, typer.Option("--data", metavar="FILE", help="the training examples")] = None,
    held_out: Annotated[str | None, typer.Option("--eval", metavar="FILE", help="the held-out examples")] = None,
    kind: Annotated[
        str | None,
        typer.Option("--format", help="prompt_completion, chat, text, svg_caption; none: as the data has it"),
    ] = None,
    cluster: Annotated[str | None, typer.Option("--cluster", metavar="NAME", help="as `clusters` lists it")] = None,
    partition: Annotated[str | None, typer.Option("--partition", metavar="NAME")] = None,
    account: Annotated[str | None, typer.Option("--account", metavar="NAME")] = None,
    gpus: Annotated[int | None, typer.Option("--gpus", min=1, metavar="N", help="GPUs of the one node")] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", metavar="TYPE", help="size for this card; see `gpus`")] = None,
    time: Annotated[str | None, typer.Option("--time", metavar="TIME", help="[days-]hours:minutes:seconds")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="none: NAME.yaml")] = None,
) -> None:
    """Write a commented spec to start from, with settings that fit. Without options a terminal is asked."""
    from lora_jobs.workflows.starting import Answers, find_place, init_spec

    if not name.name:
        raise SpecError("init needs a name for the spec", hint="lora-jobs init my_job")
    given = {
        "model": model, "train": data, "held_out": held_out, "format": kind, "cluster": cluster,
        "partition": partition, "account": account, "gpus": gpus, "gpu": gpu, "time": time,
    }  # fmt: skip
    find_place(name, output)
    asks = not any(value is not None for value in given.values()) and sys.stdin.isatty() and sys.stdout.isatty()
    answers = ask_all() if asks else Answers(**{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]
    show_started(init_spec(name, answers, output))


def ask_all() -> Answers:
    """The questions of a new user; Return takes what stands in brackets."""
    from lora_jobs.sizing.models import find_shape
    from lora_jobs.spec import load_environment
    from lora_jobs.workflows.starting import Answers, detect_format

    default = Answers()
    model = ask("base model, a Hub id or a directory", default.model, find_shape)
    train = ask(
        "training examples, a JSONL or Parquet file", "data/train.jsonl", lambda file: detect_format(Path(file))
    )
    held_out = ask("held-out examples (- for none)", "data/eval.jsonl")
    cluster = ask("cluster, of those that `lora-jobs clusters` lists", default.cluster, load_environment)
    environment = load_environment(cluster)
    partition = account = None
    if environment.scheduler == "slurm":
        names = ", ".join(environment.partitions)
        partition = ask(f"partition ({names})", environment.default_partition or next(iter(environment.partitions), ""))
        account = ask("account, the project that pays (- for none)", "-")
    gpus = typer.prompt("GPUs", default=default.gpus, type=int, err=True)
    time = ask("time limit", default.time)
    return Answers(
        model=model,
        train=train,
        held_out=None if held_out == "-" else held_out,
        cluster=cluster,
        partition=partition or None,
        account=None if account in (None, "-") else account,
        gpus=gpus,
        time=time,
    )


def ask(question: str, default: str, look: Callable[[str], object] | None = None) -> str:
    """One answer; asked again as long as `look` refuses it."""
    while True:
        answer = str(typer.prompt(question, default=default, err=True)).strip()
        try:
            if look is not None:
                look(answer)
        except LoraJobsError as error:
            show_error(error)
            continue
        return answer


def show_started(started: Started) -> None:
    """Where the spec is, what was chosen, what comes next."""
    report = started.report
    say(f"wrote {started.path}")
    numbers = f"{format_gib(report.peak_bytes)} of {format_gib(report.gpu.usable_bytes)} usable on {report.gpu.name}"
    say(f"{report.word}: {numbers}", {"fits": "green", "tight": "yellow"}.get(report.word, "red"))
    for key, value in started.changed.items():
        say(f"  chosen so that it fits: {key}: {value}")
    for problem in report.blockers:
        say(f"still to do: {problem.path}: {problem.message}")
    say(f"next: lora-jobs check {started.path}")
