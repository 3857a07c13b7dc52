"""What is stored of each memory, for whoever watches a store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memos_engine.memory.cube import MemCube, time_from_text
from memos_engine.memory.governance import Principal
from memos_engine.memory.store_base import StoreBase
from memos_engine.memory.store_rows import SELECT_CUBE, cube_of
from memos_engine.memory.store_view import visible

DAY_S = 86400.0


@dataclass(frozen=True, slots=True)
class Worth:
    """A memory, its KV (records, bytes, and tokens of the longest one) and its uses a day.

    value: tokens a day that need no computing where it is spliced; of a memory without KV, that would not.
    """

    cube: MemCube
    records: int
    nbytes: int
    tokens: int
    per_day: float

    @property
    def value(self) -> float:
        return self.per_day * self.tokens

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe; without the text."""
        return {
            "id": self.cube.id,
            "uses": self.cube.uses,
            "uses_per_day": round(self.per_day, 4),
            "tokens": self.tokens,
            "value": round(self.value, 3),
            "kv_records": self.records,
            "kv_bytes": self.nbytes,
        }


def uses_per_day(cube: MemCube, now: str) -> float:
    """Uses since a memory was made, over that time; no more than one in the time since the last one, so that
    what was hot and is not any longer sinks. A day at least is looked at."""
    if not cube.uses or cube.last_used_at is None:
        return 0.0
    moment = time_from_text(now)
    age = max((moment - cube.created_at).total_seconds(), DAY_S)
    idle = max((moment - cube.last_used_at).total_seconds(), 0.0)
    return min(cube.uses / age, 1.0 / idle if idle > DAY_S else cube.uses / age) * DAY_S


class TopRows(StoreBase):
    """The store's verb for `memos-engine top`."""

    def worths(self, principal: Principal, limit: int = 20) -> list[Worth]:
        """The caller's own memories that are alive, the most valuable first."""
        now = self._now()
        where, params = visible(principal, now, own=True)
        with self._db.read() as conn:
            cubes = [
                cube_of(row)
                for row in conn.execute(
                    f"{SELECT_CUBE} WHERE {where} ORDER BY c.uses DESC, c.id LIMIT :most",
                    {**params, "most": max(20 * limit, 1000)},
                )
            ]
            kv = {
                row[0]: row[1:]
                for row in conn.execute(
                    "SELECT k.cube_id, count(*), sum(k.size), max(k.tokens) FROM kv_artifact k JOIN cube c "
                    f"ON c.id = k.cube_id WHERE {where} AND k.version = c.version GROUP BY k.cube_id",
                    params,
                )
            }
        made = []
        for cube in cubes:
            records, nbytes, tokens = kv.get(cube.id, (0, 0, len(cube.body or "") // 4))
            made.append(Worth(cube, records, nbytes, tokens, uses_per_day(cube, now)))
        made.sort(key=lambda worth: (-worth.value, worth.cube.id))
        return made[:limit]
