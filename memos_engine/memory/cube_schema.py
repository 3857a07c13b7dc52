"""The JSON Schema of a MemCube, made from the dataclass: `docs/memcube.schema.json` is what this prints."""

from __future__ import annotations

import json
import types
from dataclasses import fields
from datetime import datetime
from typing import Any, Union, get_args, get_origin, get_type_hints

from memos_engine.memory.cube import GROUPS, KINDS, ORIGINS, TOP, VISIBILITIES, MemCube
from memos_engine.memory.fact import Fact, Provenance
from memos_engine.memory.governance import Principal
from memos_engine.memory.lifecycle import LifecycleState

Schema = dict[str, Any]

_TIME: Schema = {"type": "string", "format": "date-time"}
_UUID: Schema = {"type": "string", "pattern": "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"}
_LABEL: Schema = {"type": "string", "pattern": "^[a-z][a-z0-9_]{0,31}$"}
_TYPES: dict[type, Schema] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    datetime: _TIME,
    LifecycleState: {"enum": [state.value for state in LifecycleState]},
}
# What the annotations do not say.
_NARROWER: dict[str, Schema] = {
    "id": _UUID,
    "provenance_id": _UUID,
    "kind": {"enum": list(KINDS)},
    "origin": {"enum": list(ORIGINS)},
    "visibility": {"enum": list(VISIBILITIES)},
    "semantic_type": _LABEL,
    "sensitivity": _LABEL,
    "version": {"type": "integer", "minimum": 1},
    "uses": {"type": "integer", "minimum": 0},
}


def cube_schema() -> Schema:
    """JSON Schema (draft 2020-12) of what `MemCube.to_dict` gives."""
    hints = get_type_hints(MemCube)
    groups = {name: _object({n: _field(n, hints[n]) for n in names}) for name, names in GROUPS.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "MemCube",
        "description": "A memory of memos_engine, version included. Times are in UTC.",
        **_object({**{name: _field(name, hints[name]) for name in TOP}, **groups}),
    }


def _object(properties: dict[str, Schema], optional: tuple[str, ...] = ()) -> Schema:
    required = [name for name in properties if name not in optional]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _field(name: str, hint: Any) -> Schema:
    return _NARROWER.get(name) or _type(hint)


def _type(hint: Any) -> Schema:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_type(one) for one in inner if one is not type(None)] + [{"type": "null"}]}
    if origin is tuple:
        return {"type": "array", "items": _type(inner[0])}
    if hint in (Principal, Fact, Provenance):
        hints = get_type_hints(hint)
        optional = ("branch",) if hint is Principal else ()
        return _object({field.name: _type(hints[field.name]) for field in fields(hint)}, optional)
    return dict(_TYPES[hint])


if __name__ == "__main__":
    print(json.dumps(cube_schema(), indent=2))
