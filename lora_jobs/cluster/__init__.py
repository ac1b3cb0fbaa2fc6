"""SLURM: one door to processes, parsers, client, submission."""
