"""Nearest neighbours. SQLite keeps the vectors; an index is a way to search them, never the truth."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from memos_engine.errors import MemoryInputError

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


class VectorIndex(Protocol):
    """Embeddings under int64 keys, and which of them are like a query. Not for several threads at once."""

    def __len__(self) -> int:
        """How many keys it holds."""

    def put(self, keys: Indices, matrix: Floats) -> None:
        """Hold `matrix [m, dim]`, rows of length 1 or 0, under `keys [m]`; a key's old row goes."""

    def drop(self, keys: Indices) -> None:
        """Forget these keys; unknown ones are fine."""

    def nearest(self, query: Floats, k: int) -> Indices:
        """Keys `[m <= max(k, what costs nothing more)]`, in no order, among them the `k` closest, nearly."""

    def vectors(self, keys: Indices) -> Floats:
        """`[m, dim]`; zeros for a key that is not held."""


def cosines(query: Floats, matrix: Floats) -> Floats:
    """Cosine `[n] float32` of `query [dim]` to each row of `matrix [n, dim]`, all float32.

    Rows must have length 1 or 0, as the store keeps them; the query may have any length. Cosines are rounded
    to six decimals, what float32 sums can hold. Raises `MemoryInputError` for NaN, infinity or other widths.
    """
    if query.ndim != 1 or matrix.ndim != 2:
        raise MemoryInputError(
            f"search needs a query [dim] and a matrix [n, dim], not shapes {query.shape} and {matrix.shape}."
        )
    if not np.isfinite(query).all():
        raise MemoryInputError("the query's embedding holds NaN or infinity; check the embedder.")
    if len(matrix) == 0:
        return np.zeros(0, np.float32)
    if query.shape[0] != matrix.shape[1]:
        raise MemoryInputError(
            f"the query has {query.shape[0]} numbers, the stored embeddings have {matrix.shape[1]}; "
            "use the same embedder for both."
        )
    wide = query.astype(np.float64)  # float32 has no steps between subnormal numbers
    norm = float(np.linalg.norm(wide))
    unit = (wide / norm if norm > 0 else wide).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        scores = np.round(matrix @ unit, 6) + np.float32(0)  # no -0.0
    if not np.isfinite(scores).all():  # every NaN or infinity in a row reaches its score
        raise MemoryInputError("a stored embedding holds NaN or infinity; embed that memory anew.")
    return np.asarray(scores, dtype=np.float32)
