"""What one real save does to the disk, operation by operation, and replaying any prefix of it.

Recorded by strace from the ranks of a run that saves twice and rotates; `recorded_save.json` is one such recording.
An operation is ["mkdir", path], ["write", path, bytes], ["rename", from, to], ["unlink", path], ["rmdir", path] or
["sync", path]; paths are relative to checkpoints/, which is ".".
"""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

Operation = list[str | int]
ROOT = "."
RECORDING = Path(__file__).with_name("recorded_save.json")
CALLS = (
    "openat,creat,write,pwrite64,writev,pwritev,sendfile,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir,"
    "fsync,fdatasync"
)
_LINE = re.compile(r"^(?P<pid>\d+)\s+(?P<text>.*)$")
_CALL = re.compile(r"^(?P<name>\w+)\((?P<arguments>.*)\)\s+= (?P<result>-?\d+)(?P<rest>.*)$")
_DESCRIPTOR = re.compile(r"^(?:\d+|AT_FDCWD)<(?P<path>[^>]*)>")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')


def parse_strace(text: str, root: Path) -> list[Operation]:
    """The operations below `root` in the output of `strace -f -y -s 4096 -e trace=CALLS`, adjoining writes joined."""
    operations: list[Operation] = []
    for call in _join_calls(text):
        match = _CALL.match(call)
        if match is None or int(match["result"]) < 0:
            continue
        operation = _read_call(match["name"], match["arguments"], int(match["result"]), root)
        if operation is None:
            continue
        last = operations[-1] if operations else None
        if last is not None and operation[0] == last[0] == "write" and operation[1] == last[1]:
            last[2] = int(last[2]) + int(operation[2])
        else:
            operations.append(operation)
    return operations


def _join_calls(text: str) -> list[str]:
    """Whole calls in the order of their ends; strace splits a call that another thread's line interrupts."""
    begun: dict[str, str] = {}
    calls = []
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        pid, rest = match["pid"], match["text"]
        if rest.endswith("<unfinished ...>"):
            begun[pid] = rest.removesuffix("<unfinished ...>").rstrip()
        elif rest.startswith("<... "):
            calls.append(begun.pop(pid, "") + rest.partition("resumed>")[2])
        else:
            calls.append(rest)
    return calls


def _read_call(name: str, arguments: str, result: int, root: Path) -> Operation | None:
    descriptor = _DESCRIPTOR.match(arguments)
    names = [match[1] for match in _QUOTED.finditer(arguments)]
    if name in {"write", "pwrite64", "writev", "pwritev", "sendfile", "fsync", "fdatasync"}:
        path = _relative(descriptor["path"] if descriptor else "", root)
        if path is None:
            return None
        return ["sync", path] if "sync" in name else ["write", path, result]
    if name.startswith("rename"):
        source, target = (_relative(each, root) for each in names[:2])
        return None if source is None or target is None else ["rename", source, target]
    base = descriptor["path"] if descriptor else ""
    path = _relative(names[0] if names and names[0].startswith("/") else f"{base}/{names[0] if names else ''}", root)
    if path is None:
        return None
    if name.startswith("mkdir"):
        return ["mkdir", path]
    if name in {"unlink", "rmdir"} or name == "unlinkat":
        return ["rmdir" if name == "rmdir" or "AT_REMOVEDIR" in arguments else "unlink", path]
    return ["write", path, 0] if "O_CREAT" in arguments or name == "creat" else None


def _relative(path: str, root: Path) -> str | None:
    prefix = f"{root}/"
    if path == str(root):
        return ROOT
    return path.removeprefix(prefix).rstrip("/") if path.startswith(prefix) and path != prefix else None


class Replay:
    """Applies a recording to a directory, one operation after another.

    `contents` holds what the recorded files have in the end; a file that is no longer there is zeros.
    """

    def __init__(self, operations: list[Operation], contents: Path, directory: Path) -> None:
        self.operations = operations
        self.directory = directory
        self.done = 0
        self.unsynced: set[str] = set()
        self.unnamed: list[Operation] = []
        """What was done to folders that were not flushed since: it may be undone, whatever the files hold."""
        self._removed: dict[str, bytes] = {}
        self._written: dict[str, int] = {}
        self._total: dict[int, int] = {}
        self._content: dict[int, bytes] = {}
        self._contents = contents
        self._find_ends()

    def _find_ends(self) -> None:
        """For each write: how many bytes its file gets in all, and under which name it ends."""
        names: dict[str, list[int]] = defaultdict(list)
        for index, operation in enumerate(self.operations):
            kind, path = operation[0], str(operation[1])
            if kind == "write":
                names[path].append(index)
            elif kind in {"rename", "unlink"} and path in names:
                self._close(names.pop(path), str(operation[2]) if kind == "rename" else path)
        for path, writes in names.items():
            self._close(writes, path)

    def _close(self, writes: list[int], name: str) -> None:
        total = sum(int(self.operations[index][2]) for index in writes)
        final = self._contents / name
        content = final.read_bytes() if final.is_file() else bytes(total)
        for index in writes:
            self._total[index], self._content[index] = max(total, 1), content

    def apply(self, share: float = 1.0) -> None:
        """Do the next operation; a write may be cut short, and is then not counted as done."""
        operation = self.operations[self.done]
        kind, name = operation[0], str(operation[1])
        path = self.directory / name
        if kind in {"mkdir", "rename", "unlink", "rmdir"} or (kind == "write" and not path.exists()):
            self.unnamed.append(operation)
        if kind == "mkdir":
            path.mkdir(exist_ok=True)
        elif kind == "write":
            self._write(path, name, int(operation[2]), share)
        elif kind == "rename":
            path.rename(self.directory / str(operation[2]))
            if name in self.unsynced:
                self.unsynced.add(str(operation[2]))
        elif kind == "unlink":
            self._removed[name] = path.read_bytes() if path.is_file() else b""
            path.unlink(missing_ok=True)
        elif kind == "rmdir":
            path.rmdir()
        elif kind == "sync":
            self.unsynced.discard(name)
            self.unnamed = [each for each in self.unnamed if str(Path(str(each[1])).parent) != name]
        if kind in {"rename", "unlink"}:
            self.unsynced.discard(name)
            self._written.pop(name, None)
        if share == 1.0:
            self.done += 1

    def _write(self, path: Path, name: str, count: int, share: float) -> None:
        written = self._written.get(name, 0)
        content = self._content[self.done]
        reached = round(len(content) * min(1.0, (written + count * share) / self._total[self.done]))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content[:reached])
        self.unsynced.add(name)
        if share == 1.0:
            self._written[name] = written + count

    def lose_power(self, directory: Path, chance: random.Random) -> None:
        """A copy of the present state in which each file that was never flushed is whole, cut, zeroed or gone.

        Of what was done to folders that were not flushed, each act is there or is not.
        """
        shutil.copytree(self.directory, directory)
        for name in self.unsynced:
            path = directory / name
            if not path.is_file():
                continue
            size = path.stat().st_size
            match chance.randrange(4):
                case 0:
                    path.unlink()
                case 1:
                    path.write_bytes(bytes(size))
                case 2:
                    path.write_bytes(path.read_bytes()[: size // 2])
        for operation in reversed(self.unnamed):
            if chance.randrange(2):
                self._undo(operation, directory)

    def _undo(self, operation: Operation, directory: Path) -> None:
        """As if a folder's entry had never been made, changed or taken away; nothing where its folder is gone."""
        kind, name = operation[0], str(operation[1])
        path = directory / name
        if not path.parent.is_dir():
            return
        if kind == "rmdir":
            path.mkdir(exist_ok=True)
        elif kind == "unlink":
            path.write_bytes(self._removed[name])
        elif kind == "rename" and (target := directory / str(operation[2])).exists():
            target.rename(path)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def render_recording(operations: list[Operation]) -> str:
    """One operation a line."""
    lines = ",\n".join(json.dumps(operation) for operation in operations)
    return f'{{"operations": [\n{lines}\n]}}\n'


def load_recording() -> list[Operation]:
    """The committed recording."""
    return [list(operation) for operation in json.loads(RECORDING.read_text())["operations"]]
