"""The base of every section of a spec or environment file, and the rules that tie two keys together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from msgspec import Struct
from pydantic import BaseModel, ConfigDict, model_validator

if TYPE_CHECKING:
    from collections.abc import Sequence


class Conflict(Struct, frozen=True):
    """A rule between keys that does not hold: all keys it looked at, the one to blame first, and what is wrong."""

    keys: tuple[str, ...]
    message: str


class ConflictError(ValueError):
    """Raised inside a section's validation; the loader gives each conflict its own key and line."""

    def __init__(self, conflicts: Sequence[Conflict]) -> None:
        super().__init__("; ".join(f"{conflict.keys[0]}: {conflict.message}" for conflict in conflicts))
        self.conflicts = tuple(conflicts)


class Section(BaseModel):
    """Base of every section: strict types, no unknown key, not changed once built."""

    # defer_build: a section's validator is built within that of its spec, not once more for itself.
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, defer_build=True)

    # A key's former name in the library it comes from -> its present one, under which it is stored.
    older_words: ClassVar[dict[str, str]] = {}

    # A key of the library that has no use here -> why, for whoever brings a config along.
    unneeded_words: ClassVar[dict[str, str]] = {}

    def __hash__(self) -> int:
        """Of the values as text: a section may hold mappings, which are not hashable, and is never changed."""
        return hash((type(self), self.model_dump_json()))

    def find_conflicts(self) -> list[Conflict]:
        """Rules between keys of this section that do not hold; keys are relative to the section."""
        return []

    @model_validator(mode="before")
    @classmethod
    def _rename_older_words(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not cls.older_words.keys() & values.keys():
            return values
        both = [(old, new) for old, new in cls.older_words.items() if old in values and new in values]
        if both:
            raise ConflictError(
                [
                    Conflict((old, new), f"is the older word for {new}, which is given too: keep one")
                    for old, new in both
                ]
            )
        return {cls.older_words.get(key, key): value for key, value in values.items()}

    @model_validator(mode="after")
    def _no_conflicts(self) -> Self:
        conflicts = self.find_conflicts()
        if conflicts:
            raise ConflictError(conflicts)
        return self
