"""MemOperator: from a query to the caller's memories that fit it best."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from memos_engine.errors import IntegrityError, MemoryInputError
from memos_engine.memory.cube import MemCube, validate_text
from memos_engine.memory.governance import Principal
from memos_engine.memory.index import ExactIndex, VectorIndex
from memos_engine.memory.store import MemoryStore

if TYPE_CHECKING:
    from memos_engine.memory.embed import Embedder

BATCH = 32
"""Memories embedded at once when an embedder meets them for the first time."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A memory and its cosine to the query, -1 to 1."""

    cube: MemCube
    score: float


class MemOperator:
    """Dense retrieval over what the caller may see: the store filters, the index ranks what is left."""

    def __init__(self, store: MemoryStore, embedder: Embedder, index: VectorIndex | None = None) -> None:
        self._store = store
        self._embedder = embedder
        self._index = index or ExactIndex()

    def remember(
        self,
        principal: Principal,
        text: str,
        *,
        tags: Iterable[str] = (),
        semantic_type: str = "fact",
        origin: str = "user_input",
        idempotency_key: str | None = None,
    ) -> MemCube:
        """Embed and store a new memory; see `MemoryStore.add` for its promises and errors."""
        validate_text(text)
        return self._store.add(
            principal,
            text,
            vector=self._embed([text])[0],
            model_id=self._embedder.model_id,
            tags=tags,
            semantic_type=semantic_type,
            origin=origin,
            idempotency_key=idempotency_key,
        )

    def recall(
        self, principal: Principal, text: str, k: int = 8, min_score: float | None = None
    ) -> list[Candidate]:
        """The caller's `k` live memories closest to `text`, best first; none below `min_score`.

        Everything stored before the call can be found, also by an embedder that has not seen it yet. Raises
        `MemoryInputError`.
        """
        validate_text(text)
        if k < 1:
            raise MemoryInputError(f"k must be at least 1, not {k}.")
        self._embed_missing(principal)
        ids, matrix = self._store.vectors(principal, self._embedder.model_id)
        if not ids:
            return []
        rows, scores = self._index.search(self._embed([text])[0], matrix, k)
        found = [(ids[row], float(score)) for row, score in zip(rows, scores, strict=True)]
        if min_score is not None:
            found = [(cube_id, score) for cube_id, score in found if score >= min_score]
        cubes = self._store.get_many(principal, [cube_id for cube_id, _ in found])
        return [Candidate(cubes[cube_id], score) for cube_id, score in found if cube_id in cubes]

    def _embed(self, texts: list[str]) -> npt.NDArray[np.float32]:
        matrix = self._embedder.embed(texts)
        if matrix.shape != (len(texts), self._embedder.dim):
            raise MemoryInputError(
                f"embedder {self._embedder.model_id!r} gave shape {matrix.shape} for {len(texts)} texts "
                f"instead of {(len(texts), self._embedder.dim)}; use one that gives a row for each text."
            )
        return matrix

    def _embed_missing(self, principal: Principal) -> None:
        model_id = self._embedder.model_id
        previous: list[str] = []
        while cubes := self._store.without_vector(principal, model_id, BATCH):
            ids = [cube.id for cube in cubes]
            if ids == previous:
                raise IntegrityError(
                    f"embeddings of {model_id!r} do not stay in the store; please report this."
                )
            previous = ids
            self._store.put_vectors(
                principal, model_id, cubes, self._embed([cube.body or "" for cube in cubes])
            )
