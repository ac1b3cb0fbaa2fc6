"""Model, tokenizer and dataset into the Hugging Face cache, where compute nodes without internet find them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct

from lora_jobs.errors import ClusterError, Problem, SpecError
from lora_jobs.sizing import find_shape
from lora_jobs.spec import load_environment, load_spec, replace_values
from lora_jobs.spec.hub import find_cache, find_snapshot
from lora_jobs.units import format_gib

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lora_jobs.spec import ClusterEnvironment, JobSpec

Kind = Literal["model", "dataset"]
OFFLINE_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
# Weights in other formats, and what was exported for other runtimes: training reads safetensors.
UNWANTED = (
    "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.tflite", "original/*",
    "consolidated*", "onnx/*", "openvino/*", "coreml/*",
)  # fmt: skip
ROOM = 1.02
"""Free space wanted over the size of the files."""


class Source(Struct, frozen=True):
    """One repository of the hub that a spec names; `key` is where."""

    key: str
    kind: Kind
    repository: str
    revision: str | None


class Fetched(Struct, frozen=True):
    """What is in the cache now."""

    source: Source
    directory: Path
    commit: str
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.source.kind,
            "repository": self.source.repository,
            "revision": self.source.revision,
            "commit": self.commit,
            "directory": str(self.directory),
            "bytes": self.bytes,
        }


def list_sources(spec: JobSpec) -> tuple[Source, ...]:
    """The repositories that the job reads; local directories are none."""
    found = []
    if not Path(spec.model.name_or_path).is_dir():
        found.append(Source("model.name_or_path", "model", spec.model.name_or_path, spec.model.revision))
    if spec.data.dataset is not None and not spec.data.names_dataset_directory():
        found.append(Source("data.dataset", "dataset", spec.data.dataset, spec.data.dataset_revision))
    return tuple(found)


def is_offline(variables: Mapping[str, str]) -> bool:
    """Whether these variables keep a job from asking the hub."""
    return any(variables.get(name, "").upper() in {"1", "ON", "YES", "TRUE"} for name in OFFLINE_SWITCHES)


def find_unfetched(spec: JobSpec, environment: ClusterEnvironment) -> Iterator[Problem]:
    """What an offline job would not find in the cache; looks at directory names only, so it needs no library."""
    if not is_offline(environment.environment):
        return
    cache = find_cache({**os.environ, **environment.environment})
    for source in list_sources(spec):
        if _find_cached(cache, source) is None:
            yield Problem(source.key, f"{source.repository} is not in {cache}, for offline nodes: lora-jobs fetch")


def name_fetched_model(spec: JobSpec, environment: ClusterEnvironment) -> JobSpec:
    """The spec with the model's directory in the cache for its name, where only that directory tells its shape."""
    try:
        find_shape(spec.model.name_or_path)
    except SpecError:
        source = next((source for source in list_sources(spec) if source.kind == "model"), None)
        variables = {**os.environ, **environment.environment}
        snapshot = _find_cached(find_cache(variables), source) if source is not None else None
        if snapshot is not None and (snapshot / "config.json").exists():
            return replace_values(spec, {"model.name_or_path": str(snapshot)})
    return spec


def _find_cached(cache: Path, source: Source) -> Path | None:
    return find_snapshot(cache, source.kind, source.repository, source.revision)


def fetch_job(path: Path, overrides: Sequence[str] = ()) -> tuple[JobSpec, tuple[Fetched, ...]]:
    """Download what the job reads from the hub into the job's own cache; what is there already is not loaded again.

    Errors: SpecError for a name that the hub does not know or does not give out, ClusterError where there is no way to
    the hub or no room.
    """
    spec = load_spec(path, overrides)
    environment = load_environment(spec.resources.cluster)
    sources = list_sources(spec)
    if not sources:
        return spec, ()
    cache = find_cache({**os.environ, **environment.environment})
    _prepare_hub()
    return spec, tuple(_fetch(source, cache, with_code=spec.model.trust_remote_code) for source in sources)


def _prepare_hub() -> None:
    """The switches that keep a job offline are meant for compute nodes; the library reads them when it is imported."""
    for name in OFFLINE_SWITCHES:
        os.environ.pop(name, None)
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise ClusterError(
            "fetching needs huggingface_hub, which is not installed here", hint="pip install 'lora-jobs[hub]'"
        ) from error


def _fetch(source: Source, cache: Path, *, with_code: bool) -> Fetched:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    unwanted = [*UNWANTED, *([] if with_code else ["*.py"])] if source.kind == "model" else ["*.py"]
    wanted: dict[str, Any] = {
        "repo_type": source.kind,
        "revision": source.revision,
        "cache_dir": cache,
        "ignore_patterns": unwanted,
    }
    try:
        files = snapshot_download(source.repository, dry_run=True, **wanted)
        _refuse_useless(source, [file.filename for file in files])
        _refuse_full_disk(source, cache, sum(file.file_size or 0 for file in files if file.will_download))
        directory = Path(snapshot_download(source.repository, dry_run=False, **wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise _translate(source, error) from error
    except DryRunError as error:
        raise _translate(source, error.__cause__ or error) from error
    return Fetched(source, directory, directory.name, sum(file.file_size or 0 for file in files))


def _refuse_useless(source: Source, wanted: Sequence[str]) -> None:
    if source.kind == "model" and not any(name.endswith(".safetensors") for name in wanted):
        raise SpecError(
            f"{source.key}: {source.repository} has no safetensors files",
            hint="weights in pickles are not loaded; convert the model once, or name another repository",
        )


def _refuse_full_disk(source: Source, cache: Path, size: int) -> None:
    place = next(each for each in (cache, *cache.parents) if each.exists())
    free = shutil.disk_usage(place).free
    if size * ROOM > free:
        raise ClusterError(
            f"{source.repository} needs {format_gib(size)} more, and {place} has {format_gib(free)} free",
            hint="set HF_HOME to a roomier directory, here and under environment: of the cluster's file in envs/",
        )


def _translate(source: Source, error: BaseException) -> SpecError | ClusterError:
    """The hub's answer in words."""
    from huggingface_hub import errors

    what = f"{source.kind} {source.repository}"
    if isinstance(error, errors.GatedRepoError):
        return SpecError(
            f"{source.key}: {what} is gated, and this account may not read it",
            hint=f"accept its licence on the hub's page of {source.repository}, then `hf auth login`",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return SpecError(f"{source.key}: {what} has no revision {source.revision!r}", hint="a branch, tag or commit")
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return SpecError(
            f"{source.key}: the hub knows no {what}, or it is private",
            hint="check the spelling (organisation/name); for a private one `hf auth login`",
        )
    said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return ClusterError(
        f"{what} can't be fetched: {said}", hint="compute nodes have no internet: run this on a login node"
    )
