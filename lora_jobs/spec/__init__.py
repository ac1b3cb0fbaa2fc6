"""WHAT is asked: typed values from YAML."""

from lora_jobs.spec.dataset import find_data_problems, iterate_rows
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
from lora_jobs.spec.limits import find_resource_problems, find_submission_problems
from lora_jobs.spec.load import (
    Document,
    list_variants,
    load_document,
    load_spec,
    override_spec,
    parse_document,
    parse_spec,
    replace_values,
)
from lora_jobs.spec.render import render_spec
from lora_jobs.spec.schema import build_schema
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
    "build_schema",
    "find_data_problems",
    "find_resource_problems",
    "find_submission_problems",
    "find_translations",
    "iterate_rows",
    "list_environments",
    "list_variants",
    "load_document",
    "load_environment",
    "load_spec",
    "override_spec",
    "parse_document",
    "parse_environment",
    "parse_spec",
    "render_spec",
    "replace_values",
    "translate_targets",
]
