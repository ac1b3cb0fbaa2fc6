"""Where the files that travel with the package are: the checkout's top level, or the wheel's `_data`."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def find_resource_directory(name: str) -> Path:
    """Directory `name` ("templates" or "envs") of this installation."""
    installed = PACKAGE / "_data" / name
    return installed if installed.is_dir() else PACKAGE.parent / name
