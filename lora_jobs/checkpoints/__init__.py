"""Commit, verify, choose, rotate, and compare with the spec. A checkpoint counts when its manifest holds."""

from lora_jobs.checkpoints.choose import Choice, choose_checkpoint, list_checkpoints
from lora_jobs.checkpoints.drift import (
    ALLOWED_FILE,
    WORLD_KEYS,
    Drift,
    find_drift,
    find_run_drift,
    list_allowed,
    record_inputs,
    refuse_drift,
)
from lora_jobs.checkpoints.manifest import MANIFEST, FileEntry, Manifest, commit_checkpoint, load_manifest
from lora_jobs.checkpoints.rotate import discard_partial, rotate_checkpoints
from lora_jobs.checkpoints.verify import CheckpointVerdict, find_step, verify_checkpoint

__all__ = [
    "ALLOWED_FILE",
    "MANIFEST",
    "WORLD_KEYS",
    "CheckpointVerdict",
    "Choice",
    "Drift",
    "FileEntry",
    "Manifest",
    "choose_checkpoint",
    "commit_checkpoint",
    "discard_partial",
    "find_drift",
    "find_run_drift",
    "find_step",
    "list_allowed",
    "list_checkpoints",
    "load_manifest",
    "record_inputs",
    "refuse_drift",
    "rotate_checkpoints",
    "verify_checkpoint",
]
