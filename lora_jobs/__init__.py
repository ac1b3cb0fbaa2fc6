"""One YAML job spec to a finished, verified LoRA adapter on a Slurm cluster."""

__version__ = "0.1.0"
