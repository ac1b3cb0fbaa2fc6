"""What a spec needs installed, and what is said where it is not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from lora_jobs.errors import ClusterError
from lora_jobs.spec import parse_environment, parse_spec, replace_values
from lora_jobs.workflows.checking import check_spec
from lora_jobs.workflows.packages import list_needs, refuse_missing_packages

if TYPE_CHECKING:
    from pathlib import Path

TEXT = """
name: needs
model: {name_or_path: google/gemma-2-2b, dtype: bfloat16}
lora: {r: 8}
data: {train: train.jsonl}
training: {max_steps: 3, bf16: true}
resources: {cluster: local, gpu: A100-40}
"""
FLASH = {"model.attn_implementation": "flash_attention_2"}
PRESENT = dict.fromkeys(("torch", "transformers", "peft", "trl", "datasets"), "9.9")


def find_faults(changes: dict[str, Any], installed: dict[str, str]) -> list[str]:
    spec = replace_values(parse_spec(TEXT, source="f"), changes)
    return [fault for need in list_needs(spec) if (fault := need.find_fault({**PRESENT, **installed})) is not None]


@pytest.mark.parametrize(
    ("changes", "installed", "faults"),
    [
        ({}, {}, []),
        ({"deepspeed.zero_stage": 2}, {}, ["deepspeed not installed (for the section deepspeed)"]),
        (
            {"training.optim": "paged_adamw_8bit"},
            {},
            ["bitsandbytes not installed (for training.optim: paged_adamw_8bit)"],
        ),
        (
            FLASH,
            {},
            ["flash-attn >= 2.6.0 not installed (for model.attn_implementation: flash_attention_2 with soft-capping)"],
        ),
        (
            FLASH,
            {"flash-attn": "2.5.9.post1"},
            [
                "flash-attn is 2.5.9.post1: model.attn_implementation: flash_attention_2 with soft-capping needs 2.6.0 "
                "or newer"
            ],
        ),
        (FLASH, {"flash-attn": "2.8.3"}, []),
        (FLASH, {"kernels": "0.10.0"}, []),
        ({**FLASH, "model.name_or_path": "google/gemma-3-1b-it"}, {"flash-attn": "2.5.9"}, []),
        (
            {"training.use_liger_kernel": True, "training.trainer": "transformers"},
            {},
            ["liger-kernel >= 0.3.0 not installed (for training.use_liger_kernel)"],
        ),
        (
            {"training.report_to": ["tensorboard", "wandb", "trackio"]},
            {"tensorboard": "2.21"},
            [
                "wandb not installed (for training.report_to: wandb)",
                "trackio not installed (for training.report_to: trackio)",
            ],
        ),
    ],
)
def test_needs(changes: dict[str, Any], installed: dict[str, str], faults: list[str]) -> None:
    assert find_faults(changes, installed) == faults


def test_the_jobs_own_interpreter_is_asked(tmp_path: Path) -> None:
    """A fake interpreter that says what it has: everything but flash-attn."""
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n# A fake interpreter: answers as the probe of installed packages would.\n"
        'echo \'{"python": "3.11", "prefix": "/", "cuda": null, "packages": {"torch": "2.13", "transformers": "5.23",'
        ' "peft": "0.21", "trl": "1.16", "datasets": "5", "flash-attn": null}}\'\n'
    )
    python.chmod(0o755)
    environment = parse_environment(f"{{scheduler: local, python: {python}}}", name="here", file="envs/here.yaml")
    changes = {**FLASH, "data.train": str(tmp_path / "train.jsonl")}
    report = check_spec(replace_values(parse_spec(TEXT, source="f"), changes), environment, "local")
    with pytest.raises(ClusterError, match=r"can't train it: flash-attn >= 2\.6\.0 not installed") as caught:
        refuse_missing_packages(report)
    assert f"{python} -m pip install" in (caught.value.hint or "")
