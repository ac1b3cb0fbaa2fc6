"""The git checkout that a spec was submitted from: its commit, and what in it was not committed; never a secret."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from msgspec import Struct

from lora_jobs.cluster.commands import find_command, run_command
from lora_jobs.errors import CommandError

GIT_SECONDS = 10.0
MOST_DIFF_BYTES = 1024**2
MOST_NAMES = 200

# Known forms of tokens, a password inside a URL, and what is assigned to a name that speaks of a secret.
_SECRET_LINE = re.compile(
    r"\b(?:hf_|gh[pousr]_|github_pat_|glpat-|sk-|xox[abprs]-)[A-Za-z0-9_-]{16,}|\bAKIA[0-9A-Z]{16}\b"
    r"|://[^/\s:@]+:[^/\s@]+@"
    r"|(?:\b|_)(?:token|secret|password|passwd|api_?key|access_?key|credentials?)[\"']?\s*[:=]\s*[\"']?"
    r"(?=[^\s\"']*[0-9])[^\s\"']{8,}",
    re.IGNORECASE,
)
_SECRET_FILE = re.compile(
    r"(?:^|/)(?:\.env(?:\.[^/]*)?|\.netrc|\.pypirc|\.npmrc|id_(?:rsa|dsa|ecdsa|ed25519)|[^/]*credentials[^/]*"
    r"|[^/]*secrets?(?:\.[^/]*)?|[^/]*\.(?:pem|key|p12|pfx))$",
    re.IGNORECASE,
)
_PRIVATE_KEY = "PRIVATE KEY-----"
_USER_INFO = re.compile(r"(?<=://)[^/@\s]+@")
_FILE_HEAD = re.compile(r"^(?=diff --git )", re.MULTILINE)
REDACTED = "[a line that looks like a secret is left out]"


class Checkout(Struct, frozen=True):
    """A git working tree. `diff` is against the commit, without secrets and cut to `MOST_DIFF_BYTES`."""

    root: str
    commit: str | None
    branch: str | None
    remote: str | None
    changed: tuple[str, ...]
    untracked: tuple[str, ...]
    diff: str
    diff_is_whole: bool
    left_out: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The content of git.json; the diff stands in a file of its own."""
        return {
            "root": self.root,
            "commit": self.commit,
            "branch": self.branch,
            "remote": self.remote,
            "dirty": bool(self.changed),
            "changed": list(self.changed),
            "untracked": list(self.untracked),
            "diff_is_whole": self.diff_is_whole,
            "left_out": list(self.left_out),
        }


def read_checkout(directory: Path) -> Checkout | None:
    """The checkout that holds `directory`; None where there is none, no git, or git gives no answer in time."""
    if find_command("git") is None:
        return None
    try:
        root = _ask(directory, "rev-parse", "--show-toplevel")
        status = _ask(directory, "status", "--porcelain=v2", "--branch", "-z", "--untracked-files=normal")
        if root is None or status is None:
            return None
        facts, changed, untracked = parse_status(status)
        remote = _ask(directory, "config", "--get", "remote.origin.url")
        diff = (_ask(Path(root.strip()), "diff", *_PLAIN, "HEAD") or "") if changed and facts.get("commit") else ""
    except CommandError:
        return None
    kept, left_out = redact_diff(diff)
    return Checkout(
        root=root.strip(),
        commit=facts.get("commit"),
        branch=facts.get("branch"),
        remote=_USER_INFO.sub("", remote.strip()) if remote else None,
        changed=tuple(changed[:MOST_NAMES]),
        untracked=tuple(untracked[:MOST_NAMES]),
        diff=(cut := cut_diff(kept)),
        diff_is_whole=cut == kept and not left_out,
        left_out=left_out,
    )


_PLAIN = ("--no-ext-diff", "--no-textconv", "--no-color", "--src-prefix=a/", "--dst-prefix=b/")


def _ask(directory: Path, *words: str) -> str | None:
    """What git prints; None where it refuses. It takes no lock and starts no program of the repository's own."""
    argv = ("git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-C", str(directory), *words)
    answer = run_command(argv, timeout=GIT_SECONDS)
    return answer.stdout if answer.returncode == 0 else None


def parse_status(text: str) -> tuple[dict[str, str], list[str], list[str]]:
    """{commit, branch}, changed and untracked paths of `git status --porcelain=v2 --branch -z`."""
    facts: dict[str, str] = {}
    changed, untracked = [], []
    fields = iter(text.split("\0"))
    for field in fields:
        kind, _, rest = field.partition(" ")
        if kind == "#":
            key, _, value = rest.partition(" ")
            if key == "branch.oid" and value != "(initial)":
                facts["commit"] = value
            if key == "branch.head" and value != "(detached)":
                facts["branch"] = value
        elif kind == "?":
            untracked.append(rest)
        elif kind in _FIELDS_BEFORE_PATH:
            changed.append(rest.split(" ", _FIELDS_BEFORE_PATH[kind])[-1])
            if kind == "2":
                next(fields, None)  # the path it was renamed from
    return facts, changed, untracked


# Source: git-status(1), "Porcelain Format Version 2": an ordinary change, a rename, an unmerged path.
_FIELDS_BEFORE_PATH = {"1": 7, "2": 8, "u": 9}


def redact_diff(diff: str) -> tuple[str, tuple[str, ...]]:
    """The diff without files that hold secrets, named in the second value, and without lines that look like one."""
    kept, left_out = [], []
    for part in filter(None, _FILE_HEAD.split(diff)):
        before, _, name = (word.strip('"') for word in part.partition("\n")[0].rpartition(" b/"))
        if _SECRET_FILE.search(name) or _SECRET_FILE.search(before) or _PRIVATE_KEY in part:
            left_out.append(name)
            continue
        kept.append("\n".join(_redact_line(line) for line in part.split("\n")))
    return "".join(kept), tuple(left_out)


def _redact_line(line: str) -> str:
    return f"{line[0]}{REDACTED}" if _SECRET_LINE.search(line) else line


def cut_diff(diff: str) -> str:
    """Its first `MOST_DIFF_BYTES`, in whole lines."""
    data = diff.encode("utf-8")
    if len(data) <= MOST_DIFF_BYTES:
        return diff
    return data[:MOST_DIFF_BYTES].rpartition(b"\n")[0].decode("utf-8", "ignore") + "\n"
