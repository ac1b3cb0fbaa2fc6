"""`python -m lora_jobs` is the command line."""

from lora_jobs.cli.main import run

run()
