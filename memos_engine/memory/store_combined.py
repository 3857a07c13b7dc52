"""One KV record of several memories: kept with the first, gone with any, found by who sees all of them."""

from __future__ import annotations

import json
from collections.abc import Sequence

from memos_engine.memory.governance import Principal
from memos_engine.memory.store_base import StoreBase
from memos_engine.memory.store_kv import COMBINED
from memos_engine.memory.store_view import visible
from memos_engine.memory.vault import BlobRef


class CombinedRows(StoreBase):
    """The store's verbs for combined records. They are stored by `put_kv`, with an identity that begins with
    `COMBINED` and the other memories as its `context_ids`."""

    def find_combined(self, principal: Principal, cube_ids: Sequence[str], identity: str) -> BlobRef | None:
        """The record of exactly these memories; None where there is none or the caller does not see one of
        them, in the same moment."""
        where, params = visible(principal, self._now())
        first, others = cube_ids[0], sorted(set(cube_ids[1:]))
        with self._db.read() as conn:
            seen = conn.execute(
                "SELECT count(*) FROM json_each(:ids) one CROSS JOIN cube c ON c.id = one.value WHERE "
                f"{where}",
                {**params, "ids": json.dumps([first, *others])},
            ).fetchone()[0]
            if seen != len(others) + 1:
                return None
            row = conn.execute(
                "SELECT k.sha256, k.size, k.checksum, (SELECT json_group_array(x.source_id) FROM (SELECT "
                "source_id FROM kv_context WHERE identity = k.identity AND cube_id = k.cube_id ORDER BY "
                "source_id) x) FROM kv_artifact k JOIN cube c ON c.id = k.cube_id WHERE k.identity = ? AND "
                "k.cube_id = ? AND k.version = c.version",
                (f"{COMBINED}{identity}", first),
            ).fetchone()
        if row is None or json.loads(row[3]) != others:
            return None
        return BlobRef(*row[:3])

    def combined_sizes(self, principal: Principal, cube_id: str) -> set[int]:
        """How many memories the combined records have that begin with this one; empty where the caller does
        not see it."""
        where, params = visible(principal, self._now())
        with self._db.read() as conn:
            rows = conn.execute(
                "SELECT 1 + (SELECT count(*) FROM kv_context x WHERE x.identity = k.identity AND x.cube_id = "
                "k.cube_id) FROM kv_artifact k JOIN cube c ON c.id = k.cube_id WHERE k.cube_id = :first AND "
                f"k.version = c.version AND substr(k.identity, 1, :length) = :combined AND {where}",
                {**params, "first": cube_id, "combined": COMBINED, "length": len(COMBINED)},
            ).fetchall()
        return {row[0] for row in rows}

    def owns_all(self, principal: Principal, cube_ids: Sequence[str]) -> bool:
        """Whether the caller owns all of these memories, so that they may be one record."""
        where, params = visible(principal, self._now(), own=True)
        with self._db.read() as conn:
            seen = conn.execute(
                "SELECT count(*) FROM json_each(:ids) one CROSS JOIN cube c ON c.id = one.value WHERE "
                f"{where}",
                {**params, "ids": json.dumps(list(cube_ids))},
            ).fetchone()[0]
        return bool(seen == len(cube_ids))
