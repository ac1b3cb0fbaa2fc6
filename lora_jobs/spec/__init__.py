"""WHAT is asked: typed values from YAML."""

from lora_jobs.spec.dataset import find_data_problems, find_row_faults, iterate_rows
from lora_jobs.spec.environment import (
    ClusterEnvironment,
    Partition,
    QosLimits,
    list_environments,
    load_environment,
    parse_environment,
)
from lora_jobs.spec.job import (
    DataSpec,
    DeepSpeedSpec,
    JobSpec,
    LoraSpec,
    ModelSpec,
    QuantizationSpec,
    ResourceSpec,
    ResumeSpec,
    TrainingSpec,
)
from lora_jobs.spec.limits import find_resource_problems, find_submission_problems, find_unused_resources
from lora_jobs.spec.load import (
    Document,
    load_document,
    load_spec,
    override_spec,
    parse_document,
    parse_spec,
    replace_values,
)
from lora_jobs.spec.render import render_spec
from lora_jobs.spec.schema import build_schema
from lora_jobs.spec.sweep import Variant, count_variants, expand_sweep, parse_sweep_option, show_variant
from lora_jobs.spec.targets import find_translations, translate_targets

__all__ = [
    "ClusterEnvironment",
    "DataSpec",
    "DeepSpeedSpec",
    "Document",
    "JobSpec",
    "LoraSpec",
    "ModelSpec",
    "Partition",
    "QosLimits",
    "QuantizationSpec",
    "ResourceSpec",
    "ResumeSpec",
    "TrainingSpec",
    "Variant",
    "build_schema",
    "count_variants",
    "expand_sweep",
    "find_data_problems",
    "find_resource_problems",
    "find_row_faults",
    "find_submission_problems",
    "find_translations",
    "find_unused_resources",
    "iterate_rows",
    "list_environments",
    "load_document",
    "load_environment",
    "load_spec",
    "override_spec",
    "parse_document",
    "parse_environment",
    "parse_spec",
    "parse_sweep_option",
    "render_spec",
    "replace_values",
    "show_variant",
    "translate_targets",
]
