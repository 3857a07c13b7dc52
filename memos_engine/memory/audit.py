"""The audit trail's hash chain: `hash = SHA256(previous hash || canonical JSON of the event)`.

A changed, removed, added or reordered row breaks every hash after it. Somebody who can rewrite the whole
file can rewrite the whole chain: keep a copy of the last hash elsewhere where that matters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from memos_engine.errors import MemoryInputError, StoreError

GENESIS = "0" * 64
"""What stands for the hash before the first row."""


def canonical_json(event: Mapping[str, Any]) -> str:
    """One text for one event: sorted keys, no spaces, ASCII. Raises `MemoryInputError` unless it is JSON."""
    try:
        return json.dumps(event, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise MemoryInputError(
            f"an audit event must hold JSON values only ({error}); convert the others to text."
        ) from error


def chain_hash(previous: str, event_json: str) -> str:
    """64 hex digits."""
    return hashlib.sha256(bytes.fromhex(previous) + event_json.encode("utf-8")).hexdigest()


def verify_chain(rows: Iterable[tuple[int, str, str]], last_seq: int) -> int:
    """Check rows `(seq, event_json, hash)` in order; `last_seq` is the highest number ever given out.

    Returns the number of rows. Raises `StoreError` naming the first bad row.
    """
    previous, expected = GENESIS, 1
    for seq, event, found in rows:
        if seq != expected:
            raise StoreError(
                f"audit row {expected} is missing: the trail was tampered with; restore a backup."
            )
        if found != chain_hash(previous, event):
            raise StoreError(
                f"audit row {seq} does not fit its hash: the trail was tampered with; restore a backup."
            )
        previous, expected = found, expected + 1
    if expected <= last_seq:
        raise StoreError(
            f"audit row {expected} is missing, the trail once had {last_seq}: it was cut short; restore a "
            "backup."
        )
    return expected - 1
