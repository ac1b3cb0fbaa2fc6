"""The checkout of a spec, by real git: commit, changes, and no secrets."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from lora_jobs.cluster.checkout import MOST_DIFF_BYTES, REDACTED, cut_diff, read_checkout, redact_diff
from lora_jobs.cluster.commands import find_command

if TYPE_CHECKING:
    from pathlib import Path

needs_git = pytest.mark.skipif(find_command("git") is None, reason="git is not installed")


def git(directory: Path, *words: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(directory), *identity, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "work"
    (root / "jobs").mkdir(parents=True)
    git(root, "init", "-q", "-b", "main")
    (root / "train.py").write_text("rate = 1\n")
    (root / ".env").write_text("A=1\n")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    git(root, "remote", "add", "origin", "https://me:hunter22@example.org/x.git")
    return root


@needs_git
def test_a_clean_checkout_is_its_commit(repository: Path) -> None:
    found = read_checkout(repository / "jobs")
    assert found is not None
    assert found.to_json() == {
        "root": str(repository),
        "commit": git(repository, "rev-parse", "HEAD"),
        "branch": "main",
        "remote": "https://example.org/x.git",
        "dirty": False,
        "changed": [],
        "untracked": [],
        "diff_is_whole": True,
        "left_out": [],
    }


@needs_git
def test_what_is_not_committed_stands_in_the_diff_without_secrets(repository: Path) -> None:
    (repository / "train.py").write_text("rate = 2\ntoken = 'hf_abcdefghijklmnopqrstuv'\n")
    (repository / ".env").write_text("A=2\n")
    (repository / "a file.txt").write_text("new\n")
    git(repository, "mv", "train.py", "learn it.py")
    found = read_checkout(repository / "jobs")
    assert found is not None
    assert (found.changed, found.untracked) == ((".env", "learn it.py"), ("a file.txt",))
    assert (found.left_out, found.diff_is_whole) == ((".env",), False)
    assert "+rate = 2\n" in found.diff
    assert f"+{REDACTED}\n" in found.diff
    assert "hf_" not in found.diff
    assert "A=2" not in found.diff


@needs_git
def test_before_the_first_commit_and_outside_of_any_checkout(tmp_path: Path) -> None:
    assert read_checkout(tmp_path) is None
    git(tmp_path, "init", "-q", "-b", "main")
    found = read_checkout(tmp_path)
    assert found is not None
    assert (found.commit, found.branch, found.diff) == (None, "main", "")


def test_without_git_there_is_no_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_checkout(tmp_path) is None


@pytest.mark.parametrize(
    "line",
    [
        'API_KEY="abc12345"',
        "password: tr0ub4dor&3",
        "url = https://me:pw@example.org",
        "aws = AKIAABCDEFGHIJKLMNOP",
        "export WANDB_API_KEY=0123456789abcdef0123",
    ],
)
def test_a_line_that_looks_like_a_secret_is_left_out(line: str) -> None:
    head = "diff --git a/x b/x\n--- a/x\n+++ b/x\n@@ -1 +1 @@\n"
    assert redact_diff(f"{head}+{line}\n") == (f"{head}+{REDACTED}\n", ())


@pytest.mark.parametrize(
    "line", ["tokenizer.pad_token = tokenizer.eos_token", "max_new_tokens: 128", "https://example.org/a@b"]
)
def test_a_line_that_does_not_stays(line: str) -> None:
    text = f"diff --git a/x b/x\n+{line}\n"
    assert redact_diff(text) == (text, ())


def test_a_file_with_a_private_key_is_left_out_whole() -> None:
    good = "diff --git a/x b/x\n+y\n"
    key = "diff --git a/notes b/notes\n+-----BEGIN OPENSSH PRIVATE KEY-----\n+abc\n"
    assert redact_diff(key + good) == (good, ("notes",))


def test_a_long_diff_is_cut_at_a_line() -> None:
    cut = cut_diff("é" * 99 + "\n" + ("x" * 99 + "\n") * 20_000)
    assert len(cut.encode()) <= MOST_DIFF_BYTES
    assert cut.endswith("x\n")
    assert cut_diff("a\n") == "a\n"
