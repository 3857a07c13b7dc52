"""NewMemory: everything that a memory can be given when it is added, checked before anything is written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

import numpy.typing as npt

from memos_engine.errors import MemoryInputError
from memos_engine.memory.cube import validate_half_life, validate_priority, validate_visibility
from memos_engine.memory.fact import Fact, Provenance
from memos_engine.memory.values import (
    time_to_text,
    validate_label,
    validate_origin,
    validate_tags,
    validate_text,
)


@dataclass(frozen=True, eq=False)
class NewMemory:
    """A memory to be added; its fields are the arguments of `MemoryStore.add`, where a `valid_from` becomes a
    `fact` that says no more. Raises `MemoryInputError`."""

    text: str
    vector: npt.ArrayLike | None = None
    model_id: str | None = None
    tags: Iterable[str] = ()
    semantic_type: str = "fact"
    origin: str = "user_input"
    idempotency_key: str | None = None
    ttl_at: datetime | None = None
    half_life_s: float | None = None
    visibility: str = "private"
    priority: int = 0
    sensitivity: str = "normal"
    fact: Fact | None = None
    provenance: Provenance | None = None
    derived_from: Iterable[str] = ()
    session: str | None = None
    valid_from: datetime | None = None

    def __post_init__(self) -> None:
        validate_text(self.text)
        object.__setattr__(self, "tags", validate_tags(self.tags))
        object.__setattr__(self, "derived_from", ids_once("derived_from", self.derived_from))
        validate_label("semantic_type", self.semantic_type)
        validate_label("sensitivity", self.sensitivity)
        validate_origin(self.origin)
        validate_visibility(self.visibility)
        validate_priority(self.priority)
        validate_half_life(self.half_life_s)
        check_embedding(self.vector, self.model_id)
        if self.idempotency_key is not None:
            validate_text(self.idempotency_key, 1000)
        if self.ttl_at is not None:
            time_to_text(self.ttl_at)
        if self.session is not None:
            validate_text(self.session, 256)
        if self.valid_from is not None:
            if self.fact is not None:
                raise MemoryInputError("a fact has a valid_from of its own; give that one only.")
            object.__setattr__(self, "fact", Fact(valid_from=self.valid_from))
            object.__setattr__(self, "valid_from", None)


def check_embedding(vector: npt.ArrayLike | None, model_id: str | None) -> None:
    """Raises `MemoryInputError` unless both are there or neither."""
    if (vector is None) != (model_id is None):
        raise MemoryInputError("an embedding needs both vector and model_id, or leave both out.")
    if model_id is not None:
        validate_text(model_id, 256)


def ids_once(what: str, ids: Iterable[str]) -> tuple[str, ...]:
    """Ids without repetitions, in order. Raises `MemoryInputError` for one text in place of a list."""
    if isinstance(ids, (str, bytes)):
        raise MemoryInputError(f"{what} must be a list of memory ids, not one {type(ids).__name__}.")
    return tuple(dict.fromkeys(ids))
