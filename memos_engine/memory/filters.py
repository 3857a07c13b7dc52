"""What a search may return, apart from what the caller may see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from datetime import datetime

from memos_engine.errors import MemoryInputError
from memos_engine.memory.cube import is_cube_id, time_to_text, validate_label, validate_tags
from memos_engine.memory.lifecycle import LIVE, LifecycleState

# field, column, comparison: an interval holds its beginning, not its end
_TIMES = (
    ("created_from", "c.created_at", ">="),
    ("created_to", "c.created_at", "<"),
    ("valid_from", "f.valid_from", ">="),
    ("valid_to", "f.valid_from", "<"),
)


@dataclass(frozen=True, slots=True)
class Filters:
    """Conditions that hits must meet, all of them; they drop hits and never change a score.

    `tags_any`, `tags_all`, `tags_none`: tags of which a memory has at least one, all, none. `created_from`
    and `created_to` bound when it was stored, `valid_from` and `valid_to` since when it holds; beginnings are
    inside, ends are not. `ids`: only these (None: any). `states`: archived memories show when asked for,
    deleted and expired ones never. `per_source`: at most so many hits of one session (a memory without one
    is a source by itself). Raises `MemoryInputError`.
    """

    tags_any: tuple[str, ...] = ()
    tags_all: tuple[str, ...] = ()
    tags_none: tuple[str, ...] = ()
    created_from: datetime | None = None
    created_to: datetime | None = None
    valid_from: datetime | None = None
    valid_to: datetime | None = None
    semantic_types: tuple[str, ...] = ()
    ids: tuple[str, ...] | None = None
    states: frozenset[LifecycleState] = LIVE
    per_source: int | None = None

    def __post_init__(self) -> None:
        for tags in (self.tags_any, self.tags_all, self.tags_none):
            validate_tags(tags)
        for kind in self.semantic_types:
            validate_label("semantic_type", kind)
        for name, _, _ in _TIMES:
            if getattr(self, name) is not None:
                time_to_text(getattr(self, name))
        if self.ids is not None and not all(is_cube_id(one) for one in self.ids):
            raise MemoryInputError("ids must be memory ids; list or recall shows them.")
        if not self.states or not all(isinstance(state, LifecycleState) for state in self.states):
            raise MemoryInputError("states must be some of LifecycleState's.")
        if self.per_source is not None and self.per_source < 1:
            raise MemoryInputError(f"per_source must be at least 1, not {self.per_source}.")

    @property
    def narrow(self) -> bool:
        """Whether anything but states and sources is asked for."""
        return replace(self, states=LIVE, per_source=None) != Filters()

    def times(self) -> Iterator[tuple[str, str, str, str]]:
        """Field, column, comparison and value of each bound."""
        for name, column, sign in _TIMES:
            moment = getattr(self, name)
            if moment is not None:
                yield name, column, sign, time_to_text(moment)

    def parts(self) -> Iterator[tuple[str, Filters]]:
        """Each condition alone, by its field's name."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default and field.name not in ("states", "per_source"):
                part: Filters = replace(Filters(), **{field.name: value, "states": self.states})
                yield field.name, part
