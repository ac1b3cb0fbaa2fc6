"""A fake job environment for the tests of what is asked of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def bare_python(tmp_path: Path) -> Path:
    """An interpreter of a job environment that has everything but bitsandbytes."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n# A fake interpreter: answers as the probe of installed packages would.\n"
        'echo \'{"python": "3.11", "prefix": "/", "cuda": null, "packages": {"torch": "2.13", "transformers": "5.23",'
        ' "peft": "0.21", "trl": "1.16", "datasets": "5", "bitsandbytes": null}}\'\n'
    )
    python.chmod(0o755)
    return python
