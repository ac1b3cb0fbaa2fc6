"""Commands about what a job reads: `data` and `fetch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_jobs.cli.screen import print_json, say
from lora_jobs.units import format_gib

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="the job spec, a YAML file")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="beats the file")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, nothing else")]


def preview_data(
    spec: SpecPath,
    overrides: Overrides = None,
    examples: Annotated[int, typer.Option("--examples", min=0, max=100, help="how many examples to show")] = 3,
    rows: Annotated[int, typer.Option("--rows", min=1, help="how many rows of each file to tokenize")] = 10_000,
    as_json: AsJson = False,
) -> None:
    """Show examples as the model sees them, what of them is learned, and how long all of them are."""
    from lora_jobs.cli.show_data import show_preview
    from lora_jobs.workflows.previewing import preview_job

    preview = preview_job(spec, overrides or (), rows=rows, examples=examples)
    print_json(preview.to_json()) if as_json else show_preview(preview)


def fetch(spec: SpecPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Download the model, its tokenizer and the dataset into the job's cache, on a node that has internet."""
    from lora_jobs.workflows.fetching import fetch_job

    job, fetched = fetch_job(spec, overrides or ())
    if as_json:
        print_json({"name": job.name, "fetched": [each.to_json() for each in fetched]})
        return
    if not fetched:
        say(f"{job.name} reads nothing from the hub: model and data are files of this machine")
    for each in fetched:
        say(f"{each.source.kind} {each.source.repository}: {format_gib(each.bytes)} in {each.directory}")
        if each.source.revision != each.commit:
            key = "model.revision" if each.source.kind == "model" else "data.dataset_revision"
            say(f"  to get these very files again: {key}: {each.commit}")
    say(f"next: lora-jobs data {spec} · lora-jobs check {spec}")
