"""Room for the next checkpoint: by the size of the last one, before the first by the estimate."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import xxhash

from lora_jobs.checkpoints import MANIFEST, find_shortage
from lora_jobs.checkpoints.room import RESERVE_BYTES, find_committed_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Maker = Callable[..., Path]

HUGE = 10**18


def test_the_estimate_counts_until_something_is_committed(tmp_path: Path, commit: Maker) -> None:
    shortage = find_shortage(tmp_path, estimated_bytes=HUGE)
    assert shortage is not None
    assert shortage.startswith(f"{tmp_path} has ")
    assert shortage.endswith(f" bytes free, the next checkpoint needs {HUGE * 105 // 100 + RESERVE_BYTES:,}")
    assert find_shortage(tmp_path) is None
    committed = commit(4)
    size = sum(path.stat().st_size for path in committed.rglob("*") if path.is_file() and path.name != MANIFEST)
    assert find_committed_bytes(tmp_path) == size
    assert find_shortage(tmp_path, estimated_bytes=HUGE) is None


def test_the_newest_readable_manifest_tells_the_size(tmp_path: Path, commit: Maker) -> None:
    newer, newest = commit(8), commit(12)
    values = json.loads((newer / MANIFEST).read_text())
    del values["digest"]
    values["files"]["README.md"]["bytes"] = HUGE
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
    (newer / MANIFEST).write_text(json.dumps({**values, "digest": xxhash.xxh3_128(canonical).hexdigest()}))
    assert find_shortage(tmp_path) is None
    os.truncate(newest / MANIFEST, 10)
    assert find_shortage(tmp_path) is not None
