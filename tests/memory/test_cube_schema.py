"""The published JSON Schema is that of the dataclass, and what a store gives conforms to it."""

from __future__ import annotations

import json
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from memos_engine.memory.cube import Fact, Provenance
from memos_engine.memory.cube_schema import cube_schema
from memos_engine.memory.governance import Principal
from memos_engine.memory.store import MemoryStore

PUBLISHED = Path(__file__).parents[2] / "docs" / "memcube.schema.json"


def conforms(value: Any, schema: dict[str, Any]) -> bool:
    """As much of JSON Schema as ours uses."""
    if "anyOf" in schema:
        return any(conforms(value, one) for one in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    if schema["type"] == "object":
        known = schema["properties"]
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= set(value) <= set(known)
            and all(conforms(value[name], known[name]) for name in value)
        )
    if schema["type"] == "array":
        return isinstance(value, list) and all(conforms(one, schema["items"]) for one in value)
    kinds = {"string": (str,), "integer": (int,), "number": (int, float), "null": (type(None),)}
    if not isinstance(value, kinds[schema["type"]]) or isinstance(value, bool):
        return False
    if "pattern" in schema and not re.search(schema["pattern"], value):
        return False
    if schema.get("format") == "date-time" and datetime.fromisoformat(value).tzinfo is None:
        return False
    return bool(value >= schema["minimum"]) if "minimum" in schema else True


def test_the_published_schema_is_up_to_date() -> None:
    made = json.dumps(cube_schema(), indent=2) + "\n"
    assert PUBLISHED.read_text() == made, (
        "python -m memos_engine.memory.cube_schema > docs/memcube.schema.json"
    )


def test_what_a_store_gives_conforms(store: MemoryStore, alice: Principal) -> None:
    schema = cube_schema()
    plain = store.add(alice, "x")
    full = store.add(
        alice,
        "y",
        half_life_s=5,
        tags=["t"],
        fact=Fact("a", "b"),
        provenance=Provenance("p", links=("l",)),
        ttl_at=datetime(2030, 1, 1, tzinfo=timezone.utc),
    )
    store.record_use(alice, [full.id])
    for cube in (plain, full, store.get(alice, full.id), store.update(alice, full.id, "z")):
        data = json.loads(json.dumps(cube.to_dict()))
        assert conforms(data, schema)
        for group, key in (("descriptive", "tags"), ("governance", "priority"), ("behavioural", "uses")):
            assert not conforms({**data, group: {**data[group], key: "wrong"}}, schema)
            assert not conforms({k: v for k, v in data.items() if k != group}, schema)


@pytest.mark.parametrize("bad", [{"version": 0}, {"kind": "video"}, {"id": "x"}, {"extra": 1}])
def test_the_checker_refuses(store: MemoryStore, alice: Principal, bad: dict[str, Any]) -> None:
    assert not conforms({**store.add(alice, "x").to_dict(), **bad}, cube_schema())
