"""MemScheduler: which memories go into a request, in which order and form, and why.

A pure function of its inputs: no clock, no files, no model. The first policy is simple: the best-scored
memories that fit the window, as KV wherever a usable record exists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memos_engine.errors import MemoryInputError

REQUEST_FORMS = ("auto", "text", "kv", "none")


@dataclass(frozen=True, slots=True)
class KVAvailability:
    """Whether a usable KV record of a memory exists; if not, `reason` says why.

    `tokens` is the record's length; `exact_in_slot0`: a record that is exact right behind the anchor exists.
    """

    available: bool
    tokens: int = 0
    exact_in_slot0: bool = False
    reason: str = ""


@dataclass(frozen=True, slots=True)
class PlanInput:
    """A candidate: how alike it is to the query, the tokens of its wrapped span as text, and its KV.

    `relevance` is its place among the candidates (None: its score); `score` is what `min_score` speaks of.
    """

    cube_id: str
    score: float
    text_tokens: int
    kv: KVAvailability
    relevance: float | None = None

    @property
    def rank(self) -> float:
        return self.score if self.relevance is None else self.relevance


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What the caller wants and what there is room for.

    `form`: `auto` and `kv` take KV where there is a record and text elsewhere (`kv` says so in the reason),
    `text` takes text only, `none` takes no memory. `max_memory_tokens` is the room in the window. `recompute`
    is the share of memory tokens to compute anew, 0 to 1.
    """

    form: str
    max_memory_tokens: int
    max_memories: int
    min_score: float | None = None
    recompute: float = 0.0

    def __post_init__(self) -> None:
        if self.form not in REQUEST_FORMS:
            raise MemoryInputError(f"form must be one of {', '.join(REQUEST_FORMS)}, not {self.form!r}.")
        if self.max_memory_tokens < 0 or self.max_memories < 0:
            raise MemoryInputError("max_memory_tokens and max_memories must be at least 0.")
        if not 0.0 <= self.recompute <= 1.0:
            raise MemoryInputError(
                f"recompute={self.recompute!r}: it is a share of the memory tokens, between 0 and 1."
            )


@dataclass(frozen=True, slots=True)
class Segment:
    """A memory that goes in: `slot` counts from the anchor, `tokens` is its length in the window."""

    cube_id: str
    form: str
    reason: str
    slot: int
    tokens: int
    score: float = 0.0


@dataclass(frozen=True, slots=True)
class Skipped:
    """A memory that stays out, and why."""

    cube_id: str
    reason: str
    score: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What goes into the request, in order; every candidate is in `segments` or in `skipped`."""

    segments: tuple[Segment, ...]
    skipped: tuple[Skipped, ...]
    recompute: float = 0.0

    @property
    def tokens(self) -> int:
        return sum(segment.tokens for segment in self.segments)

    def explain(self) -> list[dict[str, Any]]:
        """One JSON-safe row for each candidate: form `kv`, `text` or `skip`, and the reason."""
        taken = [
            {
                "cube_id": s.cube_id,
                "form": s.form,
                "slot": s.slot,
                "tokens": s.tokens,
                "score": s.score,
                "reason": s.reason,
            }
            for s in self.segments
        ]
        left = [
            {
                "cube_id": s.cube_id,
                "form": "skip",
                "slot": None,
                "tokens": 0,
                "score": s.score,
                "reason": s.reason,
            }
            for s in self.skipped
        ]
        return taken + left


class MemScheduler:
    """The policy. Most relevant first: the likeliest memory gets slot 0, where its record is exact."""

    def plan(self, candidates: Sequence[PlanInput], request: PlanRequest) -> Plan:
        """Decide about every candidate. Raises `MemoryInputError` for repeated ids and impossible numbers."""
        _check(candidates)
        segments: list[Segment] = []
        skipped: list[Skipped] = []
        used = 0
        for one in sorted(candidates, key=lambda c: (-c.rank, -c.score, c.cube_id)):
            form, tokens, reason = _choose(one, request, slot=len(segments))
            obstacle = _obstacle(one, request, len(segments), tokens, request.max_memory_tokens - used)
            if obstacle:
                skipped.append(Skipped(one.cube_id, obstacle, one.score))
                continue
            segments.append(Segment(one.cube_id, form, reason, len(segments), tokens, one.score))
            used += tokens
        return Plan(tuple(segments), tuple(skipped), request.recompute)


def _check(candidates: Sequence[PlanInput]) -> None:
    if len({one.cube_id for one in candidates}) != len(candidates):
        raise MemoryInputError("a memory is among the candidates twice; give each one once.")
    for one in candidates:
        if (
            not math.isfinite(one.score)
            or not math.isfinite(one.rank)
            or one.text_tokens < 0
            or one.kv.tokens < 0
        ):
            raise MemoryInputError(
                f"candidate {one.cube_id!r} needs a finite score and token counts of at least 0."
            )


def _choose(one: PlanInput, request: PlanRequest, slot: int) -> tuple[str, int, str]:
    """Form, tokens and reason of a candidate that goes in at `slot`."""
    if request.form == "text":
        return "text", one.text_tokens, "text was asked for"
    if one.kv.available:
        exact = slot == 0 and one.kv.exact_in_slot0
        kind = "exact behind the anchor" if exact else "position-independent"
        return "kv", one.kv.tokens, f"a KV record is stored ({kind})"
    why = one.kv.reason or "no KV record is stored"
    return "text", one.text_tokens, f"KV was asked for, but {why}" if request.form == "kv" else why


def _obstacle(one: PlanInput, request: PlanRequest, taken: int, tokens: int, room: int) -> str:
    """Why a candidate cannot go in; empty when it can."""
    if request.form == "none":
        return "no memories were asked for"
    if request.min_score is not None and one.score < request.min_score:
        return f"its score {one.score:.3f} is below min_score {request.min_score:.3f}"
    if taken >= request.max_memories:
        return f"max_memories ({request.max_memories}) is reached"
    if tokens > room:
        return f"it needs {tokens} tokens, {room} of {request.max_memory_tokens} are left"
    return ""
