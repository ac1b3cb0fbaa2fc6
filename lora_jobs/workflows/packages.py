"""What a spec needs installed where the job runs, and whether it is there: asked before the queue."""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from msgspec import Struct

from lora_jobs.cluster.surroundings import read_interpreter
from lora_jobs.errors import ClusterError
from lora_jobs.sizing import find_shape
from lora_jobs.workflows.findings import split_version

if TYPE_CHECKING:
    from lora_jobs.spec import JobSpec
    from lora_jobs.workflows.checking import CheckReport


class Need(Struct, frozen=True):
    """One package that training imports: any of `names` will do; `because` names the setting that asks for it."""

    names: tuple[str, ...]
    because: str = "every run"
    minimum: str | None = None
    """The oldest version of the first name that works; None: any."""

    def find_fault(self, installed: dict[str, str | None]) -> str | None:
        """What is wrong with what is installed; None where the need is met."""
        present = [name for name in self.names if installed.get(name)]
        if not present:
            wanted = f"{self.names[0]} >= {self.minimum}" if self.minimum else self.names[0]
            return f"{wanted} not installed (for {self.because})"
        found = installed[present[0]] or ""
        old = self.minimum and present[0] == self.names[0] and split_version(found) < split_version(self.minimum)
        return f"{present[0]} is {found}: {self.because} needs {self.minimum} or newer" if old else None


def list_needs(spec: JobSpec) -> tuple[Need, ...]:
    """What the training of this spec imports. Sources: transformers' and TRL's own checks of what is installed."""
    training = spec.training
    needs = [Need((name,)) for name in ("torch", "transformers", "peft", "trl", "datasets")]
    if spec.deepspeed is not None:
        needs.append(Need(("deepspeed",), "the section deepspeed"))
    if spec.model.quantization is not None or "bit" in training.optim:
        setting = "model.quantization" if spec.model.quantization else f"training.optim: {training.optim}"
        needs.append(Need(("bitsandbytes",), setting))
    if spec.model.attn_implementation == "flash_attention_2":
        caps = find_shape(spec.model.name_or_path).traits.attention_soft_cap
        because = "model.attn_implementation: flash_attention_2" + (" with soft-capping" if caps else "")
        # Without flash-attn transformers takes the same kernel from the package kernels.
        needs.append(Need(("flash-attn", "kernels"), because, "2.6.0" if caps else "2.3.3"))
    if training.use_liger_kernel:
        needs.append(Need(("liger-kernel",), "training.use_liger_kernel", "0.3.0"))
    needs += [Need((name,), f"training.report_to: {name}") for name in training.report_to or ()]
    if "bleu" in training.final_metrics:
        needs.append(Need(("sacrebleu",), "training.final_metrics: bleu"))
    return tuple(needs)


@lru_cache(maxsize=32)
def read_versions(python: str, names: tuple[str, ...]) -> dict[str, str | None] | None:
    """Versions that this interpreter would import; None where it cannot be asked from here."""
    if python != sys.executable:
        try:
            return dict(read_interpreter(python, names).packages)
        except ClusterError:
            return None
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def refuse_missing_packages(report: CheckReport, *others: JobSpec) -> None:
    """ClusterError where find_missing_packages has something to say: better now than on the node."""
    if (missing := find_missing_packages(report, *others)) is not None:
        raise missing


def find_missing_packages(report: CheckReport, *others: JobSpec) -> ClusterError | None:
    """What the job's environment lacks that this spec (and the others of its sweep) needs, and how to get it.

    An interpreter that only the nodes can start is not asked; `doctor` says that it could not be.
    """
    python = report.environment.python or sys.executable
    needs = dict.fromkeys(need for spec in (report.spec, *others) for need in list_needs(spec))
    installed = read_versions(python, tuple(dict.fromkeys(name for need in needs for name in need.names)))
    if installed is None:
        return None
    faults = [fault for need in needs if (fault := need.find_fault(installed)) is not None]
    if not faults:
        return None
    install = f"{python} -m pip install '.[train,quantization]' -c envs/constraints.txt in the checkout"
    other = f", or name another interpreter as `python:` in envs/{report.environment.name}.yaml"
    return ClusterError(
        f"the job would run in {python}, which can't train it: {'; '.join(faults)}",
        hint=install + (other if report.backend == "slurm" else ""),
    )
