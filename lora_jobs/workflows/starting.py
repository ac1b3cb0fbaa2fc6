"""The first spec of a new user: from a few answers, checked before it is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from lora_jobs.errors import LoraJobsError, RunError, SpecError
from lora_jobs.rendering.starter import change_value, render_starter
from lora_jobs.runs import write_atomic
from lora_jobs.sizing.models import find_shape
from lora_jobs.spec import load_environment, parse_spec, replace_values
from lora_jobs.spec.words import NAME_PATTERN
from lora_jobs.workflows.checking import CheckReport, check_spec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_jobs.spec import ClusterEnvironment, JobSpec

FORMATS = ("prompt_completion", "chat", "text", "svg_caption")
# The keys of a row, by format. Source: DataSpec.format.
_KEYS = {
    frozenset({"prompt", "completion"}): "prompt_completion",
    frozenset({"messages"}): "chat",
    frozenset({"svg", "caption"}): "svg_caption",
    frozenset({"text"}): "text",
}


class Answers(Struct, frozen=True):
    """What a new user was asked. `format` None: as the first row of the training file has it."""

    model: str = "meta-llama/Llama-3.2-1B-Instruct"
    train: str | None = None
    held_out: str | None = None
    format: str | None = None
    cluster: str = "local"
    partition: str | None = None
    account: str | None = None
    gpus: int = 1
    gpu: str | None = None
    time: str = "04:00:00"


DEFAULTS = Answers()


class Started(Struct, frozen=True):
    """The file that was written, what `check` says of it, and what was changed so that it fits."""

    path: Path
    report: CheckReport
    changed: dict[str, object]


def find_place(name: Path, output: Path | None) -> tuple[Path, str]:
    """Where the spec goes and the job's name. Errors: SpecError for a file that is there, or an unusable name."""
    path = output or (name if name.suffix in (".yaml", ".yml") else name.with_name(name.name + ".yaml"))
    if path.exists():
        raise SpecError(f"{path} exists already", hint="choose another name: nothing was changed")
    stem = name.stem if name.suffix in (".yaml", ".yml") else name.name
    if re.fullmatch(NAME_PATTERN, stem) is None:
        wanted = "a letter, then letters, digits, dots, underscores or dashes, 64 at most"
        raise SpecError(f"{stem!r} is no name for a job: wanted {wanted}", hint="lora-jobs init my_job")
    return path, stem


def init_spec(name: Path, answers: Answers = DEFAULTS, output: Path | None = None) -> Started:
    """Write a commented spec that fits, as far as `check` knows what would.

    Errors: SpecError, RunError where the file can't be written; no file then.
    """
    path, stem = find_place(name, output)
    environment = load_environment(answers.cluster)
    text = render_answers(stem, answers, environment)
    spec = parse_spec(text, source=str(path))
    report = check_spec(spec, environment, environment.scheduler)
    changed: dict[str, object] = {}
    for suggestion in report.verdict.suggestions if not report.fits else ():
        fitting = apply_changes(text, suggestion.set, spec)
        if suggestion.fits and fitting is not None:
            text, changed = fitting, dict(suggestion.set)
            report = check_spec(parse_spec(text, source=str(path)), environment, environment.scheduler)
            break
    write_spec(path, text)
    return Started(path, report, changed)


def write_spec(path: Path, text: str) -> None:
    """The file, and the directories that it needs. Errors: RunError."""
    hint = "choose a place that you may write to, with -o FILE or by another name"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.filename}: {error.strerror}", hint=hint) from error
    except RunError as error:
        raise RunError(error.message, hint=hint) from error


def render_answers(name: str, answers: Answers, environment: ClusterEnvironment) -> str:
    """The answers as the text of a spec. Errors: SpecError for what does not exist."""
    train = answers.train or "data/train.jsonl"
    default_held_out = "data/eval.jsonl" if answers.train is None else None
    kind = answers.format or detect_format(Path(train)) or FORMATS[0]
    if kind not in FORMATS:
        raise SpecError(f"unknown format {kind!r}: wanted one of {', '.join(FORMATS)}")
    return render_starter(
        {
            "name": name,
            "model": name_model(answers.model),
            "train": train,
            "eval": answers.held_out or default_held_out,
            "format": kind,
            "cluster": answers.cluster,
            "partition": answers.partition,
            "account": answers.account,
            "account_required": environment.account_required,
            "gpus": answers.gpus,
            "several": answers.gpus > 1,
            "gpu": answers.gpu,
            "time": answers.time,
        }
    )


def name_model(model: str) -> str:
    """The name that from_pretrained takes; of a row of the model table its first id. Errors: SpecError."""
    shape = find_shape(model)
    known = {name.lower() for name in shape.hub_ids}
    return model if model.lower() in known or Path(model).expanduser().is_dir() else (*shape.hub_ids, model)[0]


def detect_format(path: Path) -> str | None:
    """The format by the keys of the first row of a JSONL file; None where it is not there, or no JSONL.

    Errors: SpecError where the keys are those of no format.
    """
    try:
        with path.open(encoding="utf-8") as file:
            row = json.loads(file.readline(1_000_000))
    except (OSError, ValueError):
        return None
    if not isinstance(row, dict):
        return None
    found = next((kind for keys, kind in _KEYS.items() if keys <= row.keys()), None)
    if found is None:
        wanted = "; ".join(f"{kind}: {' and '.join(sorted(keys))}" for keys, kind in _KEYS.items())
        raise SpecError(f"{path}: its first row has the keys {', '.join(sorted(row))[:200]}, wanted {wanted}")
    return found


def apply_changes(text: str, changes: Mapping[str, Any], spec: JobSpec) -> str | None:
    """The text with these settings; None where it would not mean just that."""
    for key, value in changes.items():
        text = change_value(text, key, value)
    try:
        return text if parse_spec(text, source="spec") == replace_values(spec, dict(changes)) else None
    except LoraJobsError:
        return None
