"""WHERE a job runs: one YAML file per cluster, with its partitions, their GPUs and limits, and what is exported."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Struct
from pydantic import AfterValidator, Field

from lora_jobs.errors import Problem, SpecError
from lora_jobs.resources import find_resource_directory
from lora_jobs.spec.display import find_nearest, show_key
from lora_jobs.spec.load import build_value
from lora_jobs.spec.section import Conflict, Section
from lora_jobs.spec.source import Source, load_text, parse_source
from lora_jobs.spec.words import (
    NAME_PATTERN,
    VARIABLE_PATTERN,
    Count,
    Duration,
    Names,
    Prose,
    Size,
    Text,
    Word,
    check_line,
)

SUFFIXES = (".yaml", ".yml")
_SECRET_WORDS = {
    "TOKEN",
    "TOKENS",
    "KEY",
    "KEYS",
    "SECRET",
    "SECRETS",
    "PASSWORD",
    "PASSWD",
    "CREDENTIAL",
    "CREDENTIALS",
}
_SECRET_ENDINGS = ("TOKEN", "APIKEY", "SECRET", "PASSWORD", "PASSWD")
# Tokens of Hugging Face, GitHub, GitLab, Weights & Biases' kin; and a password inside a URL.
_SECRET_VALUE = re.compile(r"\b(?:hf_|ghp_|github_pat_|glpat-|sk-)[A-Za-z0-9_-]{16,}|://[^/\s:@]+:[^/\s@]+@")
_RESERVED = re.compile(
    r"(?:SLURM|SBATCH|SRUN|SUBMITIT|LORA_JOBS)_.*|RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT"
)

Value = Annotated[str, Field(max_length=4096), AfterValidator(check_line)]
Variable = Annotated[str, Field(pattern=VARIABLE_PATTERN)]


class QosLimits(Section):
    """Limits of a quality of service; what is left out is the partition's."""

    max_time: Duration | None = None
    max_nodes: Count | None = None


class Partition(Section):
    """A partition: the GPU of its nodes, by its name in the GPU table, and what one job may ask for."""

    gpu: Word | None = Field(
        None, description="name in the GPU table (lora-jobs gpus); left out: this machine's, or CPU"
    )
    gpus_per_node: Count | None = None
    cpus_per_node: Count | None = None
    mem_per_node: Size | None = None
    max_time: Duration | None = None
    max_nodes: Count | None = None
    qos: dict[Word, QosLimits] = Field({}, description="limits that take the place of the partition's")


class ClusterEnvironment(Section):
    """One file of envs/: a cluster, or this machine."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    description: Prose | None = None
    source: Prose | None = Field(None, description="where the numbers come from")
    file: Text | None = Field(None, description="set when loaded: the file this came from")
    scheduler: Literal["slurm", "local"]
    account_required: bool = False
    default_partition: Word | None = None
    partitions: dict[Word, Partition] = Field({}, description="by Slurm's names")
    gpu_option: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    modules: Names = ()
    python: Text | None = Field(None, description="interpreter of the job's environment; left out: this one's")
    environment: dict[Variable, Value] = Field({}, description="exported in the job, as written: no $ is expanded")

    def find_conflicts(self) -> list[Conflict]:
        found = []
        if self.default_partition is not None and self.default_partition not in self.partitions:
            message = f"is none of the partitions below: {', '.join(self.partitions) or 'there are none'}"
            found.append(Conflict(("default_partition", "partitions"), message))
        for variable, value in self.environment.items():
            if (fault := _find_fault_of_variable(variable, value)) is not None:
                found.append(Conflict((f"environment.{variable}",), fault))
        return found

    def find_partition(self, name: str | None) -> Partition | None:
        """The partition of that name, the default one for None; None where there is no such partition."""
        chosen = self.default_partition if name is None else name
        return None if chosen is None else self.partitions.get(chosen)

    def to_values(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return self.model_dump(mode="json")


def _find_fault_of_variable(name: str, value: str) -> str | None:
    upper = name.upper()
    if set(upper.split("_")) & _SECRET_WORDS or upper.endswith(_SECRET_ENDINGS):
        return "looks like a secret: scripts are stored with every run; export it in your shell, sbatch passes it on"
    if _SECRET_VALUE.search(value):
        return "its value looks like a secret: export it in your shell instead, sbatch passes it on"
    if _RESERVED.fullmatch(upper):
        return "is set by Slurm or by lora-jobs itself: take it out"
    return None


class _Place(Struct, frozen=True):
    """A directory that environments are looked for in."""

    directory: Path

    def list_files(self) -> list[Path]:
        if not self.directory.is_dir():
            return []
        return sorted(path for path in self.directory.iterdir() if path.suffix in SUFFIXES and path.is_file())


def load_environment(name_or_path: str) -> ClusterEnvironment:
    """The environment of that name, or in that file.

    A path has a slash or ends in .yaml or .yml; a name is looked for in $LORA_JOBS_ENVS, ./envs, and the package's own
    files. Raises SpecError, with the known names.
    """
    if "/" in name_or_path or name_or_path.endswith(SUFFIXES):
        path = Path(name_or_path).expanduser()
        if path.exists():
            return _load_file(path)
        known = ", ".join(_list_environment_files()) or "none"
        message = f"{show_key(name_or_path)}: no such file"
        hint = f"give the path of a cluster file, or a name (known: {known})"
        raise SpecError(message, problems=[Problem("resources.cluster", message)], hint=hint)
    files = _list_environment_files()
    if name_or_path in files:
        return _load_file(files[name_or_path])
    nearest = find_nearest(name_or_path, files)
    meant = f"; did you mean {nearest}?" if nearest is not None else ""
    message = f"unknown cluster {show_key(name_or_path)!r}{meant} (known: {', '.join(files) or 'none'})"
    hint = "add envs/NAME.yaml for it, or give the path of such a file"
    raise SpecError(message, problems=[Problem("resources.cluster", message)], hint=hint)


def list_environments() -> tuple[list[ClusterEnvironment], list[SpecError]]:
    """Every environment that can be named, by name, and what is wrong with the files that can't be read."""
    found, errors = [], []
    for _, path in sorted(_list_environment_files().items()):
        try:
            found.append(_load_file(path))
        except SpecError as error:
            errors.append(error)
    return found, errors


def parse_environment(text: str, *, name: str, file: str) -> ClusterEnvironment:
    """The environment in a YAML text; `name` is the file's, without its ending. Raises SpecError."""
    source = parse_source(text, name=file)
    problems = list(source.problems)
    given = source.values.get("name", name)
    if given != name:
        problems.append(Problem("name", f"must be the file's own name, {show_key(name)}", source.lines.get(("name",))))
    if "file" in source.values:
        problems.append(Problem("file", "is set when the file is loaded: take it out", source.lines.get(("file",))))
    values = {**source.values, "name": name, "file": file}
    completed = Source(source.name, values, source.lines, tuple(problems))
    return build_value(ClusterEnvironment, completed, minimal={"name": "x", "scheduler": "local"}).value


def _load_file(path: Path) -> ClusterEnvironment:
    return parse_environment(load_text(path), name=path.stem, file=str(path))


def _list_environment_files() -> dict[str, Path]:
    """Name -> file; an earlier place wins."""
    named = os.environ.get("LORA_JOBS_ENVS")
    if named and not Path(named).expanduser().is_dir():
        hint = "set it to a directory of cluster files, or unset it"
        raise SpecError(f"LORA_JOBS_ENVS names no directory: {show_key(named)}", hint=hint)
    places = [_Place(Path(named).expanduser())] if named else []
    places += [_Place(Path("envs")), _Place(find_resource_directory("envs"))]
    files: dict[str, Path] = {}
    for place in places:
        for path in place.list_files():
            files.setdefault(path.stem, path)
    return files
