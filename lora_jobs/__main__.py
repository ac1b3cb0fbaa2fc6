"""`lora-jobs` and `python -m lora_jobs`: the command line, its start made short."""

from __future__ import annotations

import gc

RARELY = 500_000
"""Objects made before garbage is looked for: what a command imports and reads is none, and it lives for a second."""


def run() -> None:
    """Entry point. The collector is told before the imports, which make the most objects."""
    gc.set_threshold(RARELY)
    from lora_jobs.cli.main import run

    run()


if __name__ == "__main__":
    run()
