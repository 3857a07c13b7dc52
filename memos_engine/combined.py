"""One KV record of several memories: encoded one after another behind the anchor, so that each has seen those
before it. At the head of a prompt it is exact, where the records of its parts are so for the first alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from memos_engine.activation import ANCHORED, ActivationMemory
from memos_engine.decoder.identity import RecordIdentity, ids_digest
from memos_engine.decoder.quantize import quantize_record
from memos_engine.decoder.record import KVRecord, decode_record, encode_record
from memos_engine.errors import MemoryNotFoundError, PayloadError, StoreError
from memos_engine.memory.cube import MemCube
from memos_engine.memory.governance import Principal
from memos_engine.memory.plan import Plan
from memos_engine.memory.store_kv import COMBINED

log = logging.getLogger("memos_engine")


def combined_identity(
    model: ActivationMemory, principal: Principal, cubes: Sequence[MemCube]
) -> tuple[RecordIdentity, tuple[int, ...]]:
    """The identity that the record of these memories, in this order, has; and its tokens."""
    ids = tuple(token for cube in cubes for token in model.layout.memory(cube.body or ""))
    anchored: Mapping[str, RecordIdentity] = model.identities(principal, cubes[0].id, ids)
    return replace(anchored[ANCHORED], tokens=ids_digest(ids)), ids


def build_combined(model: ActivationMemory, principal: Principal, cubes: Sequence[MemCube]) -> str:
    """Encodes memories behind the anchor as one record, in which each has seen those before it. All of them
    must be the caller's own."""
    if not model.store.owns_all(principal, [cube.id for cube in cubes]) or len(cubes) < 2:
        raise MemoryNotFoundError("one record is made of two memories or more, all of the caller's own.")
    identity, ids = combined_identity(model, principal, cubes)
    key, names = identity.digest(), [cube.id for cube in cubes]
    if model.store.find_combined(principal, names, key) is not None:
        return "the combined record was there"
    k, v = model.decoder.encode_span(model.layout.anchor, ids)
    record = KVRecord(k, v, ids, "", identity.anchor)
    if identity.quantizer != "none":
        record = quantize_record(record)
    blob = model.store.vault.write(encode_record(record, identity))
    for cube in cubes:  # a text that was changed meanwhile is not in it
        if model.store.get(principal, cube.id).version != cube.version:
            raise StoreError(f"memory {cube.id!r} changed while its combined record was built.")
    first = cubes[0]
    model.store.put_kv(
        principal, first.id, first.version, f"{COMBINED}{key}", blob, record.num_tokens, names[1:]
    )
    return f"one record of {len(cubes)} memories"


def load_combined(
    model: ActivationMemory, principal: Principal, cubes: Sequence[MemCube], *, read: bool = True
) -> KVRecord | None:
    """The record of exactly these memories, verified; None where there is none, where the caller does not see
    one of them now, or where it is not in a tier and shall not be read: each then goes in by itself."""
    identity, _ = combined_identity(model, principal, cubes)
    key = identity.digest()
    blob = model.store.find_combined(principal, [cube.id for cube in cubes], key)
    if blob is None:
        model.tiers.drop(f"{COMBINED}{key}")  # ended elsewhere: nothing of it stays here
        return None
    held = model.tiers.get(f"{COMBINED}{key}")
    if held is not None or not read:
        return held
    try:
        record = decode_record(model.store.vault.read(blob), identity)
    except PayloadError as error:
        model.store.drop_kv(f"{COMBINED}{key}", error.reason)
        return None
    return model.tiers.put(f"{COMBINED}{key}", record)


def joined_head(
    model: ActivationMemory, principal: Principal, plan: Plan, cubes: Mapping[str, MemCube]
) -> tuple[Plan, KVRecord | None, frozenset[str]]:
    """Puts one record in place of those of the first memories, where one of just these in just their order
    is there: the most of them. For a prompt whose memories stand right behind the anchor; elsewhere such a
    record is no better than its parts.

    Returns the plan that says so, the record for the first memory's place, and the other memories in it.
    Under a budget nothing is read from the disk for it. Any doubt means the parts.
    """
    leading = [cubes[one] for one in plan.leading("kv")]
    try:
        ids, record = _longest(model, principal, leading, plan.budget_ms is None)
    except (MemoryNotFoundError, StoreError, OSError) as error:
        log.debug("memos_engine: memories go in by themselves: %s", error)
        return plan, None, frozenset()
    if record is None:
        return plan, None, frozenset()
    segments = []
    for segment in plan.segments:
        others = ", ".join(one for one in ids if one != segment.cube_id)
        why = f"one record with {others}: exact behind the anchor"
        segments.append(replace(segment, reason=why) if segment.cube_id in ids else segment)
    return replace(plan, segments=tuple(segments)), record, frozenset(ids[1:])


def _longest(
    model: ActivationMemory, principal: Principal, leading: Sequence[MemCube], read: bool
) -> tuple[list[str], KVRecord | None]:
    """The record of the most of these memories from the first on, and which these are."""
    if len(leading) > 1:
        sizes = model.store.combined_sizes(principal, leading[0].id)
        for count in sorted((size for size in sizes if size <= len(leading)), reverse=True):
            record = load_combined(model, principal, leading[:count], read=read)
            if record is not None:
                return [cube.id for cube in leading[:count]], record
    return [], None
