"""Commit, verify, choose, rotate, and compare with the spec. A checkpoint counts when its manifest holds."""

from lora_jobs.checkpoints.aside import clear_for_save, discard_partial, discard_unfinished, set_aside
from lora_jobs.checkpoints.choose import (
    Choice,
    choose_checkpoint,
    list_checkpoints,
    list_failures,
    set_failures_aside,
)
from lora_jobs.checkpoints.commit import adopt_checkpoint, commit_checkpoint, flush_part, write_manifest
from lora_jobs.checkpoints.drift import (
    ALLOWED_FILE,
    WORLD_KEYS,
    Drift,
    find_drift,
    find_run_drift,
    list_allowed,
    refuse_drift,
)
from lora_jobs.checkpoints.inputs import record_inputs
from lora_jobs.checkpoints.loading import DUMMY_STEPS
from lora_jobs.checkpoints.manifest import MANIFEST, PINNED, AdapterDigest, FileEntry, Manifest, load_manifest
from lora_jobs.checkpoints.room import find_shortage
from lora_jobs.checkpoints.rotate import Rotation, rotate_checkpoints
from lora_jobs.checkpoints.tensors import ADAPTER_WEIGHTS, digest_tensors, read_header
from lora_jobs.checkpoints.trust import require_own
from lora_jobs.checkpoints.verify import (
    CheckpointVerdict,
    best_level,
    find_step,
    require_torch,
    verify_checkpoint,
    verify_foreign,
)

__all__ = [
    "ADAPTER_WEIGHTS",
    "ALLOWED_FILE",
    "DUMMY_STEPS",
    "MANIFEST",
    "PINNED",
    "WORLD_KEYS",
    "AdapterDigest",
    "CheckpointVerdict",
    "Choice",
    "Drift",
    "FileEntry",
    "Manifest",
    "Rotation",
    "adopt_checkpoint",
    "best_level",
    "choose_checkpoint",
    "clear_for_save",
    "commit_checkpoint",
    "digest_tensors",
    "discard_partial",
    "discard_unfinished",
    "find_drift",
    "find_run_drift",
    "find_shortage",
    "find_step",
    "flush_part",
    "list_allowed",
    "list_checkpoints",
    "list_failures",
    "load_manifest",
    "read_header",
    "record_inputs",
    "refuse_drift",
    "require_own",
    "require_torch",
    "rotate_checkpoints",
    "set_aside",
    "set_failures_aside",
    "verify_checkpoint",
    "verify_foreign",
    "write_manifest",
]
