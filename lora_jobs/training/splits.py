"""The rows of data.train and data.eval: of a file, or of a split of a Hugging Face dataset in the cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from lora_jobs.errors import SpecError
from lora_jobs.spec import find_row_faults, iterate_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_jobs.spec import DataSpec


def iterate_examples(name: str, data: DataSpec) -> Iterator[dict[str, Any]]:
    """Rows of a file, or of the split `name` of data.dataset. Errors: SpecError naming the line or the row."""
    if data.dataset is None:
        yield from iterate_rows(Path(name))
        return
    for number, row in enumerate(load_split(name, data), start=1):
        if faults := find_row_faults(row, data.format):
            raise SpecError(f"{data.dataset} ({name}) row {number}: {faults[0]}")
        yield row


def load_split(name: str, data: DataSpec) -> datasets.Dataset:
    """One split as a table. Only data files are read: no code that a dataset brings is run."""
    directory = find_snapshot(data)
    try:
        return datasets.load_dataset(str(directory), data.dataset_config, split=name)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise SpecError(
            f"data.dataset: split {name!r} of {data.dataset} can't be loaded: {said}",
            hint="data.train and data.eval name splits of data.dataset, data.dataset_config its configuration",
        ) from error


def find_snapshot(data: DataSpec) -> Path:
    """The directory that holds the dataset: data.dataset itself, or its snapshot in the Hugging Face cache."""
    name = str(data.dataset)
    if data.names_dataset_directory():
        return Path(name)
    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=data.dataset_revision))
    except (LocalEntryNotFoundError, HfHubHTTPError, ValueError, OSError) as error:
        raise SpecError(
            f"data.dataset: {name} is neither a directory here nor in the Hugging Face cache",
            hint="on a login node with internet: lora-jobs fetch SPEC",
        ) from error
