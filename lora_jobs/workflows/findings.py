"""One line of a diagnosis."""

from __future__ import annotations

import re
from typing import Any, Literal

from msgspec import Struct

Level = Literal["ok", "warning", "wrong"]


class Finding(Struct, frozen=True):
    """One line: what was looked at, how it is, and what to do about it."""

    area: str
    name: str
    level: Level
    message: str
    next: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "area": self.area, "name": self.name, "level": self.level, "message": self.message, "next": self.next,
        }  # fmt: skip


def split_version(text: str) -> tuple[int, ...]:
    """The release numbers of a version: (2, 10, 0) of "2.10.0+cu128"; a pre-release counts as its release."""
    match = re.match(r"v?(\d+(?:\.\d+)*)", text)
    return tuple(int(number) for number in match[1].split(".")) if match else ()
