"""Adapters as the control plane sees them: versions and their provenance, and what a plan may bind.

No tensors here: what an adapter holds is read where memories meet the decoder (`parameter.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from memos_engine.memory.governance import Principal
from memos_engine.memory.values import time_to_text
from memos_engine.memory.vault import BlobRef

HOW = ("imported", "trained", "composed")
MAX_NAME_CHARS = 128


@dataclass(frozen=True, slots=True)
class NewAdapter:
    """An adapter to be stored: its digest, which model it is for (`model_print`), its largest rank, bytes of
    its matrices, the first layer whose KV it changes, and how it came about. report: JSON, what was measured;
    `passed: false` in it keeps the version from being promoted. sources: ids of the owner's memories that it
    was made from."""

    digest: str
    model: str
    rank: int
    nbytes: int
    kv_floor: int | None
    how: str = "imported"
    report: Mapping[str, Any] = field(default_factory=dict)
    sources: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One stored version. current: the one in use. blob and report are gone once it is revoked. sources: the
    memories, and their versions, that it was made from. stale: why it should not be chosen by itself (a
    source was changed, or is gone), empty where nothing speaks against it."""

    cube_id: str
    version: int
    name: str | None
    owner: Principal
    digest: str
    model: str
    rank: int
    nbytes: int
    kv_floor: int | None
    how: str
    at: datetime
    current: bool
    promoted_at: datetime | None = None
    revoked_at: datetime | None = None
    revoked_why: str | None = None
    blob: BlobRef | None = None
    report: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[tuple[str, int], ...] = ()
    stale: str = ""

    @property
    def state(self) -> str:
        """current, promoted, stored or revoked."""
        if self.revoked_at is not None:
            return "revoked"
        return "current" if self.current else "promoted" if self.promoted_at is not None else "stored"

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe; times are ISO 8601 in UTC."""
        return {
            "id": self.cube_id,
            "version": self.version,
            "name": self.name,
            "owner": self.owner.to_dict(),
            "state": self.state,
            "digest": self.digest,
            "model": self.model,
            "rank": self.rank,
            "bytes": self.nbytes,
            "kv_floor": self.kv_floor,
            "how": self.how,
            "at": time_to_text(self.at),
            "promoted_at": None if self.promoted_at is None else time_to_text(self.promoted_at),
            "revoked_at": None if self.revoked_at is None else time_to_text(self.revoked_at),
            "revoked_why": self.revoked_why,
            "sources": [{"id": one, "version": version} for one, version in self.sources],
            "stale": self.stale,
            "report": dict(self.report),
        }


@dataclass(frozen=True, slots=True)
class AdapterOption:
    """What a plan may bind: pure data. probability: how surely the request is about what the adapter knows,
    0 to 1. covers: the candidate memories that it stands for, which need not enter as well. warm: it is in
    memory already. swap_ms: what binding costs, filled in by the cost model. policy: `exclusive` (covered
    memories may be left out) or `procedural` (it changes how, not what; memories enter beside it). reason:
    why it is offered."""

    cube_id: str
    version: int
    digest: str
    probability: float
    nbytes: int
    warm: bool = False
    swap_ms: float | None = None
    policy: str = "procedural"
    covers: tuple[str, ...] = ()
    reason: str = ""

    def priced(self, swap_ms: float) -> AdapterOption:
        """The same with its swap cost, milliseconds."""
        return replace(self, swap_ms=swap_ms)


@dataclass(frozen=True, slots=True)
class AdapterChoice:
    """At most one adapter for a request, and why: also why none."""

    option: AdapterOption | None
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()


def choose_adapter(
    options: Sequence[AdapterOption], *, threshold: float = 0.5, margin: float = 0.1
) -> AdapterChoice:
    """The likeliest option, or none: the "none" gate closes below `threshold`, and where two adapters are
    nearer to each other than `margin` (then neither is sure, and sums of adapters are unreliable). Pure;
    equal inputs in any order give equal choices."""
    if not options:
        return AdapterChoice(None, "no adapter fits this request")
    ranked = sorted(options, key=lambda one: (-one.probability, one.cube_id))
    best = ranked[0]
    if best.probability < threshold:
        why = f"the likeliest adapter has probability {best.probability:.2f}, below {threshold:g}"
        return AdapterChoice(None, why, tuple((one.cube_id, why) for one in ranked))
    if len(ranked) > 1 and best.probability - ranked[1].probability < margin:
        why = f"two adapters are about equally likely ({best.probability:.2f}, {ranked[1].probability:.2f})"
        return AdapterChoice(None, why, tuple((one.cube_id, why) for one in ranked))
    lost = tuple((one.cube_id, "another adapter is likelier; one enters a request") for one in ranked[1:])
    return AdapterChoice(best, best.reason or f"probability {best.probability:.2f}", lost)
