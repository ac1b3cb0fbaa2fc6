"""WHAT it costs: shapes, counts, memory; arithmetic only."""

from __future__ import annotations

from lora_jobs.sizing.cards import Card, list_common_cards
from lora_jobs.sizing.gpus import GPUS, Gpu, calibrate_gpu, cpu_device, detected_gpu, find_gpu
from lora_jobs.sizing.memory import Estimate, estimate_memory
from lora_jobs.sizing.models import MODELS, ModelShape, find_shape
from lora_jobs.sizing.parameters import count_parameters, count_trainable
from lora_jobs.sizing.suggestions import Elsewhere, Suggestion, apply_settings
from lora_jobs.sizing.targets import count_targets, match_targets
from lora_jobs.sizing.verdict import Verdict, size_job

__all__ = [
    "GPUS",
    "MODELS",
    "Card",
    "Elsewhere",
    "Estimate",
    "Gpu",
    "ModelShape",
    "Suggestion",
    "Verdict",
    "apply_settings",
    "calibrate_gpu",
    "count_parameters",
    "count_targets",
    "count_trainable",
    "cpu_device",
    "detected_gpu",
    "estimate_memory",
    "find_gpu",
    "find_shape",
    "list_common_cards",
    "match_targets",
    "size_job",
]
