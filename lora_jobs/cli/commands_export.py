"""`export`: a finished adapter, merged or packed."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads the annotations when it runs
from typing import Annotated

import typer

from lora_jobs.cli.screen import print_json, say
from lora_jobs.errors import SpecError
from lora_jobs.units import format_gib


def export(
    job: Annotated[
        str | None,
        typer.Argument(metavar="JOB", help="any Slurm id the run ever had, its name or its directory; none: the last"),
    ] = None,
    merge: Annotated[
        Path | None, typer.Option("--merge", metavar="DIR", help="the whole model, adapter merged, with its tokenizer")
    ] = None,
    pack: Annotated[
        Path | None, typer.Option("--pack", metavar="PATH", help="the adapter with a model card; .tar.gz or a folder")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="DTYPE", help="of --merge; none: the spec's model.dtype")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout, nothing else")] = False,
) -> None:
    """Merge a finished adapter into its model, or pack it with a model card. Only what verifies is exported."""
    from lora_jobs.workflows.exporting import merge_run, pack_run

    if (merge is None) == (pack is None):
        raise SpecError(
            "export takes one of --merge DIR and --pack PATH", hint="lora-jobs export JOB --pack my_adapter"
        )
    if dtype is not None and merge is None:
        raise SpecError("--dtype is for --merge: a packed adapter keeps its own")
    done = pack_run(job, pack) if pack is not None else merge_run(job, merge, dtype=dtype)  # type: ignore[arg-type]
    if as_json:
        print_json(done.to_json())
        return
    if merge is None:
        say(f"packed {done.run} in {done.path}: {format_gib(done.bytes)}")
        return
    say(f"merged {done.run} into {done.path}: {format_gib(done.bytes)}, {done.dtype}")
    say(f"loaded again, its logits are within {done.difference:.2g} of the adapter's (the largest is {done.scale:.3g})")
    if done.untied:
        say("embed_tokens and lm_head were trained apart: the merged model is no longer tied")
