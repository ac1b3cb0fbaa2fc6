"""A diagnosis to the screen: one line a finding, and under it the next step where there is one to take."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from lora_jobs.cli.screen import say

if TYPE_CHECKING:
    from lora_jobs.workflows.diagnosing import Diagnosis

STYLES = {"ok": "green", "warning": "yellow", "wrong": "bold red"}


def show_diagnosis(diagnosis: Diagnosis) -> None:
    """By area; the counts last."""
    for area, findings in groupby(diagnosis.findings, key=lambda finding: finding.area):
        say(area, "bold")
        for finding in findings:
            say(f"  {finding.level:<7}  {finding.name}: {finding.message}", STYLES[finding.level])
            if finding.next is not None:
                say(f"           next: {finding.next}")
    counts = {level: sum(finding.level == level for finding in diagnosis.findings) for level in STYLES}
    say(f"{counts['ok']} ok, {counts['warning']} warnings, {counts['wrong']} wrong", STYLES[diagnosis.worst])
