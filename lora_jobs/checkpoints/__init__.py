"""Commit, verify, choose, rotate, and compare with the spec. A checkpoint counts when its manifest holds."""

from lora_jobs.checkpoints.aside import clear_for_save, discard_partial, discard_unfinished, set_aside
from lora_jobs.checkpoints.choose import Choice, choose_checkpoint, list_checkpoints, set_failures_aside
from lora_jobs.checkpoints.commit import commit_checkpoint, flush_part, write_manifest
from lora_jobs.checkpoints.drift import Drift, find_drift
from lora_jobs.checkpoints.manifest import MANIFEST, PINNED, AdapterDigest, FileEntry, Manifest, load_manifest
from lora_jobs.checkpoints.room import find_shortage
from lora_jobs.checkpoints.rotate import Rotation, rotate_checkpoints
from lora_jobs.checkpoints.verify import CheckpointVerdict, find_step, verify_checkpoint, verify_foreign

__all__ = [
    "MANIFEST",
    "PINNED",
    "AdapterDigest",
    "CheckpointVerdict",
    "Choice",
    "Drift",
    "FileEntry",
    "Manifest",
    "Rotation",
    "choose_checkpoint",
    "clear_for_save",
    "commit_checkpoint",
    "discard_partial",
    "discard_unfinished",
    "find_drift",
    "find_shortage",
    "find_step",
    "flush_part",
    "list_checkpoints",
    "load_manifest",
    "rotate_checkpoints",
    "set_aside",
    "set_failures_aside",
    "verify_checkpoint",
    "verify_foreign",
    "write_manifest",
]
