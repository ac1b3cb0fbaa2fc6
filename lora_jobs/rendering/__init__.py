"""HOW it is written: values to text, and the Plan."""

from lora_jobs.rendering.deepspeed import build_deepspeed_config
from lora_jobs.rendering.plan import Plan, build_plan, render_deepspeed
from lora_jobs.rendering.script import render_script

__all__ = ["Plan", "build_deepspeed_config", "build_plan", "render_deepspeed", "render_script"]
