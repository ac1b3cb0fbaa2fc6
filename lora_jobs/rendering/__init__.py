"""HOW it is written: values to text, and the Plan."""

from lora_jobs.rendering.array import ArrayPlan, PlannedTask, build_array_plan
from lora_jobs.rendering.deepspeed import build_deepspeed_config
from lora_jobs.rendering.plan import Plan, build_plan, render_checkout, render_deepspeed
from lora_jobs.rendering.script import render_array_script, render_script

__all__ = [
    "ArrayPlan",
    "Plan",
    "PlannedTask",
    "build_array_plan",
    "build_deepspeed_config",
    "build_plan",
    "render_array_script",
    "render_checkout",
    "render_deepspeed",
    "render_script",
]
