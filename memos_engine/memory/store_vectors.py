"""Embeddings in the store: float32, little-endian, unit length, one per memory version and model."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from datetime import datetime

import numpy as np
import numpy.typing as npt

from memos_engine.errors import MemoryInputError
from memos_engine.memory.cube import MemCube
from memos_engine.memory.governance import Principal
from memos_engine.memory.store_base import StoreBase
from memos_engine.memory.store_rows import SELECT_CUBE, cube_of, live_states, visible

Vector = npt.NDArray[np.float32]


def unit_vector(vector: npt.ArrayLike) -> Vector:
    """`vector [dim]` as float32 of length 1 (zeros stay zeros). Raises `MemoryInputError` for others."""
    try:
        wide = np.asarray(vector, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise MemoryInputError(f"an embedding must be a sequence of numbers ({error}).") from error
    if wide.ndim != 1 or wide.size == 0:
        raise MemoryInputError(
            f"an embedding must have one axis of at least 1 number, not shape {wide.shape}."
        )
    if not np.isfinite(wide).all():
        raise MemoryInputError("the embedding holds NaN or infinity; check the embedder.")
    norm = float(np.linalg.norm(wide))
    if norm > 0 and abs(norm - 1) > 1e-4:
        wide = wide / norm
    return wide.astype(np.float32)


def insert_vector(
    conn: sqlite3.Connection,
    cube_id: str,
    version: int,
    model_id: str,
    vector: Vector,
    *,
    replace: bool = True,
) -> None:
    """In the caller's transaction; raises `MemoryInputError` for another width than the model's."""
    dim = vector.shape[0]
    conn.execute("INSERT INTO embedder VALUES (?, ?) ON CONFLICT (model_id) DO NOTHING", (model_id, dim))
    (known,) = conn.execute("SELECT dim FROM embedder WHERE model_id = ?", (model_id,)).fetchone()
    if known != dim:
        raise MemoryInputError(
            f"embeddings of {model_id!r} have {known} numbers in this store, not {dim}; give another model "
            "another id."
        )
    conn.execute(
        f"INSERT OR {'REPLACE' if replace else 'IGNORE'} INTO vector VALUES (?, ?, ?, ?, ?)",
        (cube_id, version, model_id, dim, vector.astype("<f4").tobytes()),
    )


class VectorRows(StoreBase):
    """The store's verbs for embeddings."""

    def vectors(
        self,
        principal: Principal,
        model_id: str,
        *,
        as_of: datetime | str | None = None,
        valid_at: datetime | str | None = None,
    ) -> tuple[list[str], Vector]:
        """Ids and embeddings `[n, dim]` float32 of the live memories that the caller sees, by creation.

        Memories whose fact a later one ended are left out, unless `valid_at` asks for an earlier time; for
        both times see `MemoryStore.list`. Raises `MemoryInputError`.
        """
        seen = self._view(principal, as_of, valid_at, closed=False)
        with self._db.read() as conn:
            rows = conn.execute(
                f"SELECT c.id, v.vec FROM cube c {seen.join} JOIN vector v ON v.cube_id = c.id AND "
                f"v.version = {seen.version} WHERE {seen.where} AND v.model_id = :model AND {seen.state} IN "
                "(SELECT value FROM json_each(:states)) ORDER BY c.id",
                {**seen.params, "model": model_id, "states": live_states()},
            ).fetchall()
            known = conn.execute("SELECT dim FROM embedder WHERE model_id = ?", (model_id,)).fetchone()
        matrix = np.frombuffer(b"".join(row[1] for row in rows), dtype="<f4").astype(np.float32)
        return [row[0] for row in rows], matrix.reshape(len(rows), known[0] if known else 0)

    def without_vector(self, principal: Principal, model_id: str, limit: int) -> list[MemCube]:
        """Up to `limit` of the caller's live memories that this model has not embedded yet."""
        where, params = visible(principal, self._now())
        with self._db.read() as conn:
            rows = conn.execute(
                f"{SELECT_CUBE} WHERE {where} AND c.kind <> 'lora' AND c.state IN (SELECT value FROM "
                "json_each(:states)) AND NOT EXISTS (SELECT 1 FROM vector v WHERE v.cube_id = c.id AND "
                "v.version = c.version AND v.model_id = :model) ORDER BY c.id LIMIT :limit",
                {**params, "model": model_id, "states": live_states(), "limit": limit},
            ).fetchall()
        return [cube_of(row) for row in rows]

    def put_vectors(
        self, principal: Principal, model_id: str, cubes: Sequence[MemCube], matrix: npt.NDArray[np.float32]
    ) -> int:
        """Keep `matrix [n, dim]` as the embeddings of `cubes`; those gone meanwhile are passed over.

        An embedding that is there already is replaced only by somebody who may write the memory. Returns how
        many are there now. Raises `MemoryInputError`.
        """
        if len(cubes) != len(matrix):
            raise MemoryInputError(f"{len(cubes)} memories need as many embeddings, not {len(matrix)}.")
        vectors = [unit_vector(row) for row in matrix]
        kept = 0
        with self._db.write() as conn:
            now = self._now()
            roads = {action: visible(principal, now, action=action) for action in ("read", "write")}
            for cube, vector in zip(cubes, vectors, strict=True):
                may = {
                    action: conn.execute(
                        f"SELECT 1 FROM cube c WHERE {where} AND c.id = :id AND c.version = :version",
                        {**params, "id": cube.id, "version": cube.version},
                    ).fetchone()
                    for action, (where, params) in roads.items()
                }
                if may["read"]:
                    insert_vector(conn, cube.id, cube.version, model_id, vector, replace=bool(may["write"]))
                    kept += 1
        return kept
