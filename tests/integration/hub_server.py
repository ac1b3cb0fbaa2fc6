"""A server that speaks the Hugging Face hub's protocol, for tests: repositories are directories of this machine.

This is a fake: it knows what snapshot_download asks for (a revision, its tree, files), and tells gated repositories.
"""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "v1", COMMIT)


def build_answerer(repositories: Mapping[str, Path], gated: frozenset[str], log: list[str]) -> type:
    """`repositories`: "models/org/name" or "datasets/org/name" to a directory; `log` gets the path of every request."""

    class Answerer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            path = urlsplit(self.path).path.strip("/")
            log.append(f"{self.command} {path}")
            parts = path.split("/")
            if parts[0] == "api":
                self.answer_question(parts[1:])
                return
            kind = "datasets" if parts[0] == "datasets" else "models"
            rest = parts[1:] if kind == "datasets" else parts
            name = f"{kind}/{rest[0]}/{rest[1]}"
            if name in gated:
                self.refuse(403, "GatedRepo", "access to this repository is restricted")
            elif name in repositories and rest[2] == "resolve" and rest[3] in REVISIONS:
                self.send_file(repositories[name] / "/".join(rest[4:]), with_body=with_body)
            else:
                self.refuse(404, "RepoNotFound", "Repository not found")

        def answer_question(self, parts: list[str]) -> None:
            name = "/".join(parts[:3])
            if name not in repositories:
                self.refuse(401, "RepoNotFound", "Repository not found")
            elif parts[3] in ("revision", "tree") and parts[4] not in REVISIONS:
                self.refuse(404, "RevisionNotFound", "Invalid rev id")
            elif parts[3] == "tree":
                self.send_json([describe(repositories[name], path) for path in list_files(repositories[name])])
            else:
                siblings = [{"rfilename": str(path)} for path in list_files(repositories[name])]
                self.send_json({"id": "/".join(parts[1:3]), "sha": COMMIT, "siblings": siblings, "private": False})

        def send_json(self, value: object) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def send_file(self, path: Path, *, with_body: bool) -> None:
            if not path.is_file():
                self.refuse(404, "EntryNotFound", "Entry not found")
                return
            body = path.read_bytes()
            self.send_response(200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(body, usedforsecurity=False).hexdigest()}"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def refuse(self, status: int, code: str, message: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", message)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Answerer


def list_files(directory: Path) -> list[Path]:
    return sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())


def describe(directory: Path, path: Path) -> dict[str, object]:
    body = (directory / path).read_bytes()
    return {
        "type": "file",
        "path": str(path),
        "size": len(body),
        "oid": hashlib.sha1(body, usedforsecurity=False).hexdigest(),
    }


@contextmanager
def serve_hub(repositories: Mapping[str, Path], *, gated: tuple[str, ...] = ()) -> Iterator[tuple[str, list[str]]]:
    """The address of the server, and the requests it got, while the context lasts."""
    log: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), build_answerer(repositories, frozenset(gated), log))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
