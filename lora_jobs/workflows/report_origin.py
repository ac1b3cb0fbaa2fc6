"""The parts of a report that say what was predicted, and where a run came from."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lora_jobs.rendering.page import Bar, Estimate, Table, Text
from lora_jobs.units import format_count, format_gib

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lora_jobs.runs import Run
    from lora_jobs.spec import JobSpec
    from lora_jobs.workflows.measuring import Measured

LARGEST_PARTS = 7
MOST_TEXT = 200_000
VERDICT_TONES = {"fits": "good", "tight": "warn", "does not fit": "bad"}


def load_values(path: Path) -> dict[str, Any]:
    """A JSON file of a run; empty where it is not there or is no JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def describe_estimate(stored: Mapping[str, Any], measured: Sequence[Measured]) -> Estimate | None:
    """The verdict of the submission with its parts, beside what rank 0 measured; None where neither is there."""
    try:
        estimate, gpu = stored["estimate"], stored["gpu"]
        verdict = str(stored.get("verdict") or ("fits" if stored["fits"] else "does not fit"))
        words = (
            f"{format_gib(estimate['peak_bytes'])} needed of {format_gib(gpu['usable_bytes'])} usable on {gpu['name']}"
        )
        if "peak" in stored:
            words += f"; the peak: {stored['peak']['what']}, {stored['peak']['when']}"
        parts = sorted(
            ((str(name), int(size)) for name, size in estimate["components"].items()), key=lambda row: -row[1]
        )
    except (KeyError, TypeError, ValueError):
        if not measured:
            return None
        return Estimate("no estimate", "", "estimate.json is not there or can't be read", (), list_measured(measured))
    return Estimate(verdict, VERDICT_TONES.get(verdict, ""), words, draw_bars(parts), list_measured(measured))


def draw_bars(parts: Sequence[tuple[str, int]]) -> tuple[Bar, ...]:
    """The largest parts, and the rest as one."""
    shown = [(name.replace("_", " "), size) for name, size in parts[:LARGEST_PARTS] if size > 0]
    if (rest := sum(size for _, size in parts[LARGEST_PARTS:])) > 0:
        shown.append((f"{len(parts) - LARGEST_PARTS} smaller parts", rest))
    largest = max((size for _, size in shown), default=1)
    return tuple(Bar(name, format_gib(size), round(100 * size / largest, 1)) for name, size in shown)


def list_measured(measured: Sequence[Measured]) -> Table | None:
    """Measured beside predicted."""
    if not measured:
        return None
    rows = [
        (
            one.name.replace("_", " "),
            format_gib(one.bytes),
            "" if one.predicted_bytes is None else format_gib(one.predicted_bytes),
            "" if one.difference is None else f"{one.difference:+.1%}",
        )
        for one in measured
    ]
    return Table(("memory, highest", "measured", "predicted", "difference"), tuple(rows))


def describe_origin(run: Run, spec: JobSpec, place: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Model, data, code, machine: a line each; `place` is the newest attempt-K.environment.json."""
    inputs, git = read_part(place, "inputs"), load_git(run)[0]
    data, model = read_part(inputs, "data"), read_part(inputs, "model")
    gpus = [str(gpu.get("name")) for gpu in read_list(place, "gpus") if isinstance(gpu, dict)]
    hosts = list(dict.fromkeys(str(rank.get("host")) for rank in read_list(place, "ranks") if isinstance(rank, dict)))
    rows = {
        "Base model": join(spec.model.name_or_path, model.get("commit") or spec.model.revision),
        "Adapter": f"LoRA, r {spec.lora.r}, alpha {spec.lora.alpha:g}, {name_targets(spec)}",
        "Training data": join(spec.data.dataset, spec.data.train, count_examples(data)),
        "Data fingerprint": str(data.get("hash") or load_values(find_newest(run, "data.json")).get("data.train") or ""),
        "Git": describe_git(git),
        "Host": join(*(hosts or [str(place.get("host") or "")]), place.get("platform")),
        "GPU": join(*dict.fromkeys(f"{gpus.count(name)} x {name}" for name in gpus), place.get("driver")),
        "Python": join(read_part(place, "python").get("version"), read_part(place, "python").get("executable")),
        "Libraries": ", ".join(name_libraries(place)),
        "Run directory": str(run.directory),
    }
    return tuple((name, value) for name, value in rows.items() if value)


def collect_texts(run: Run, place: Mapping[str, Any]) -> tuple[Text, ...]:
    """The spec, the script, the changes that were not committed, every package: to be opened."""
    packages = [str(line) for line in read_list(place, "packages")]
    texts = [
        Text("The spec, as it was resolved", read(run.spec_path)),
        Text("The batch script", read(run.script_path)),
        Text("DeepSpeed's configuration", read(run.deepspeed_path)),
        Text("Changes that were not committed", load_git(run)[1]),
        Text(f"{len(packages)} packages of the job's environment", "\n".join(packages)),
    ]
    return tuple(text for text in texts if text.body)


def load_git(run: Run) -> tuple[dict[str, Any], str]:
    """git.json and git.diff of a run, or of the sweep that it is a task of."""
    for directory in (run.directory, run.directory.parent):
        if facts := load_values(directory / "git.json"):
            return facts, read(directory / "git.diff")
    return {}, ""


def load_place(run: Run) -> dict[str, Any]:
    """The newest attempt's environment; empty before the first."""
    return load_values(find_newest(run, "environment.json"))


def find_newest(run: Run, name: str) -> Path:
    """attempt-K.NAME of the largest K; a path that is not there where there is none."""
    found = {int(number): path for path in run.directory.glob(f"attempt-*.{name}")
             if (number := path.name.split(".")[0].removeprefix("attempt-")).isdecimal()}  # fmt: skip
    return found[max(found)] if found else run.directory / f"attempt-1.{name}"


def describe_git(git: Mapping[str, Any]) -> str:
    """A commit in a line."""
    if not git:
        return ""
    changed = len(read_list(git, "changed"))
    dirty = "clean" if not changed else "1 file" if changed == 1 else f"{changed} files"
    dirty += " changed and not committed" if changed else ""
    return join(git.get("commit") or "no commit yet", git.get("branch"), git.get("remote"), dirty)


def name_targets(spec: JobSpec) -> str:
    """The modules that get an adapter."""
    targets = spec.lora.targets
    return f"on {targets if isinstance(targets, str) else ', '.join(targets)}"


def name_libraries(place: Mapping[str, Any]) -> list[str]:
    """Name and version of what computes."""
    wanted = {"torch", "transformers", "peft", "trl", "deepspeed", "accelerate", "bitsandbytes"}
    pairs = [str(line).partition("==") for line in read_list(place, "packages")]
    return [f"{name} {version}" for name, _, version in pairs if name.lower() in wanted]


def count_examples(data: Mapping[str, Any]) -> str:
    number = data.get("examples")
    return f"{format_count(number)} examples" if isinstance(number, int) else ""


def read_part(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One object inside another; empty where it is something else."""
    part = values.get(name)
    return part if isinstance(part, dict) else {}


def read_list(values: Mapping[str, Any], name: str) -> list[Any]:
    """One list inside an object; empty where it is something else."""
    part = values.get(name)
    return part if isinstance(part, list) else []


def join(*words: object) -> str:
    """What is there, with middle dots between."""
    return " · ".join(str(word) for word in words if word)


def read(path: Path) -> str:
    """A text file, cut where it is very long; empty where there is none."""
    try:
        text = path.read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""
    return text if len(text) <= MOST_TEXT else text[:MOST_TEXT] + f"\n[cut: {len(text):,} characters in {path.name}]\n"
