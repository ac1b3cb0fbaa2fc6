"""`report`: a run as one HTML page."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads the annotations when it runs
from typing import Annotated

import typer

from lora_jobs.cli.screen import print_json, say


def report(
    job: Annotated[
        str | None,
        typer.Argument(metavar="JOB", help="any Slurm id the run ever had, its name or its directory; none: the last"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="where to; none: report.html in the run")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout, nothing else")] = False,
) -> None:
    """Write one self-contained HTML page on a run: curves, memory, attempts, checkpoints, samples, provenance."""
    from lora_jobs.workflows.reporting import write_report

    path = write_report(job, output)
    if as_json:
        print_json({"report": str(path), "bytes": path.stat().st_size})
        return
    say(f"wrote {path} ({path.stat().st_size / 1024:.0f} KiB)")
