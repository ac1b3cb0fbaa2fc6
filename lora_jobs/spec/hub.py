"""Where huggingface_hub keeps what it has downloaded: directory names only, so no library is needed to look."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


def find_cache(variables: Mapping[str, str]) -> Path:
    """Where these variables put the cache of the hub's files. Source: huggingface_hub's documentation."""
    if cache := variables.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    home = variables.get("HF_HOME") or str(Path(variables.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return Path(home).expanduser() / "hub"


def find_snapshot(cache: Path, kind: str, repository: str, revision: str | None) -> Path | None:
    """The files of a "model" or "dataset" at a revision (main where None); None where they are not in the cache."""
    folder = cache / f"{kind}s--{repository.replace('/', '--')}"
    name = revision or "main"
    reference = folder / "refs" / name
    try:
        commit = reference.read_text(encoding="ascii").strip() if reference.is_file() else name
    except (OSError, UnicodeDecodeError):
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None
