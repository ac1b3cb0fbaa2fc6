"""A submission carries the checkout that its spec is in; a resume and a sweep keep it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from lora_jobs.cluster.commands import find_command
from lora_jobs.rendering import render_checkout
from lora_jobs.workflows.starting import init_spec
from lora_jobs.workflows.submitting import plan_job

pytestmark = pytest.mark.skipif(find_command("git") is None, reason="git is not installed")


def git(*words: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *words], check=True, capture_output=True)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_JOBS_HOME", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_plan_of_a_submission_holds_the_commit_and_what_was_changed(here: Path) -> None:
    init_spec(Path("job"))
    assert {"git.json", "git.diff"} & plan_job(Path("job.yaml"), ()).plan.files.keys() == set()
    git("init", "-q", "-b", "main")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    clean = plan_job(Path("job.yaml"), ()).plan.files
    assert "git.diff" not in clean
    assert json.loads(clean["git.json"])["dirty"] is False
    (here / "job.yaml").write_text((here / "job.yaml").read_text() + "# tried\n")
    changed = plan_job(Path("job.yaml"), ()).plan.files
    assert json.loads(changed["git.json"])["changed"] == ["job.yaml"]
    assert changed["git.diff"].endswith("+# tried\n")


def test_without_a_checkout_nothing_is_written() -> None:
    assert render_checkout(None, "") == {}
