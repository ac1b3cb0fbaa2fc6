"""`python -m lora_jobs.training.trace`: a job spec as one line of JSON on standard input, its trace as one line back.

Each line is answered before the next is read; what cannot be traced is answered {"error": ..., "hint": ...}, and so,
once, is an environment in which nothing can be.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
import warnings
from importlib.util import find_spec
from typing import IO, Any

from lora_jobs.errors import LoraJobsError
from lora_jobs.training.trace.shim import load_shim


def main() -> None:
    """Answer until standard input ends."""
    try:
        load_shim()
    except LoraJobsError as error:
        print(_tell(error))
        return
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints
    warnings.simplefilter("ignore")
    _prepare()
    for line in sys.stdin:
        _answer(line, answers)


def _tell(error: LoraJobsError) -> str:
    return json.dumps({"error": str(error), "hint": error.hint})


def _prepare() -> None:
    """Import the libraries and set their objects aside, so that collecting a traced model's garbage is quick."""
    from lora_jobs.training.trace import extrapolate as _extrapolate  # noqa: F401
    from lora_jobs.training.trace import kernels, quantize

    kernels.install_rules()
    if find_spec("bitsandbytes"):
        quantize.install_rules()
    gc.collect()
    gc.freeze()


def _answer(line: str, answers: IO[str]) -> None:
    from msgspec.structs import asdict

    from lora_jobs.spec import parse_spec
    from lora_jobs.training.trace.extrapolate import trace_job

    try:
        request: dict[str, Any] = json.loads(line)
        trace = trace_job(parse_spec(json.dumps(request["spec"]), source="spec"), cached=request.get("cached", True))
    except LoraJobsError as error:
        answers.write(_tell(error) + "\n")
        return
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, NotImplementedError) as error:
        traceback.print_exc()
        what = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
        answers.write(json.dumps({"error": f"this model's code cannot be traced: {what}", "hint": None}) + "\n")
        return
    answers.write(json.dumps({**asdict(trace), "peak_bytes": trace.peak_bytes}) + "\n")


main()
