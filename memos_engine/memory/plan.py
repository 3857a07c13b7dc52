"""What the scheduler is asked and what it answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from memos_engine.errors import MemoryInputError
from memos_engine.memory.adapters import AdapterOption
from memos_engine.memory.costs import Frame

REQUEST_FORMS = ("auto", "text", "kv", "none")


@dataclass(frozen=True, slots=True)
class KVAvailability:
    """Whether a usable KV record of a memory exists; if not, `reason` says why.

    `tokens` is the record's length; `exact_in_slot0`: a record that is exact right behind the anchor exists.
    `tier`: where it waits (device, host or disk); `nbytes`: what reading it moves.
    """

    available: bool
    tokens: int = 0
    exact_in_slot0: bool = False
    reason: str = ""
    tier: str = "host"
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class PlanInput:
    """A candidate: how alike it is to the query, the tokens of its wrapped span as text, and its KV.

    `relevance` is its place among the candidates (None: its score); `score` is what `min_score` speaks of.
    `need`: probability that the answer needs it (None: read off relevance and score). `prefers`: `kv` or
    `text` where the paper's policies prefer one. `sketch`: what tells memories that say the same
    (`quality.sketch`); empty: nothing is known. `burden`: what its tokens take from the worth of the others;
    the scheduler sets it.
    """

    cube_id: str
    score: float
    text_tokens: int
    kv: KVAvailability
    relevance: float | None = None
    need: float | None = None
    prefers: str | None = None
    sketch: bytes = b""
    burden: float = 0.0

    @property
    def rank(self) -> float:
        return self.score if self.relevance is None else self.relevance


@dataclass(frozen=True, slots=True)
class KnownPrefix:
    """Memories that stand as exact text in pages of an earlier request, in this order right behind the head:
    whoever begins with them computes none of their `tokens`."""

    cube_ids: tuple[str, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What the caller wants and what there is room for.

    `form`: `auto` and `kv` take KV where there is a record and text elsewhere (`kv` says so in the reason),
    `text` takes text only, `none` takes no memory. `max_memory_tokens` is the room in the window. `recompute`
    is the share of memory tokens to compute anew, 0 to 1; None leaves it to the plan. `budget_ms`: time until
    the first token, counted from the call; None: the best answer. `tolerance`: how much quality a plan
    without a budget gives for speed. `frame`: what stands around the memories. `known`: prefixes in pages.
    `adapter`: the one that may be bound, having passed the gate that prefers none.
    """

    form: str
    max_memory_tokens: int
    max_memories: int
    min_score: float | None = None
    recompute: float | None = None
    budget_ms: float | None = None
    tolerance: float = 0.02
    frame: Frame = field(default_factory=Frame)
    known: Sequence[KnownPrefix] = ()
    adapter: AdapterOption | None = None

    def __post_init__(self) -> None:
        if self.form not in REQUEST_FORMS:
            raise MemoryInputError(f"form must be one of {', '.join(REQUEST_FORMS)}, not {self.form!r}.")
        if self.max_memory_tokens < 0 or self.max_memories < 0:
            raise MemoryInputError("max_memory_tokens and max_memories must be at least 0.")
        if self.recompute is not None and not 0.0 <= self.recompute <= 1.0:
            raise MemoryInputError(
                f"recompute={self.recompute!r}: it is a share of the memory tokens, between 0 and 1."
            )
        check_budget(self.budget_ms)


def check_budget(budget_ms: float | None) -> None:
    """Raises MemoryInputError for a budget that is no time."""
    if budget_ms is None:
        return
    number = isinstance(budget_ms, (int, float)) and not isinstance(budget_ms, bool)
    if not number or not math.isfinite(budget_ms) or budget_ms <= 0:
        raise MemoryInputError(
            f"ttft_budget_ms={budget_ms!r}: milliseconds until the first token, more than 0; leave it out "
            "for the best answer."
        )


@dataclass(frozen=True, slots=True)
class Segment:
    """A memory that goes in: `slot` counts from the anchor, `tokens` is its length in the window. `need` is
    its probability of being needed, `value` what it adds to the plan's quality."""

    cube_id: str
    form: str
    reason: str
    slot: int
    tokens: int
    score: float = 0.0
    need: float = 0.0
    value: float = 0.0


@dataclass(frozen=True, slots=True)
class Skipped:
    """A memory that stays out, and why."""

    cube_id: str
    reason: str
    score: float = 0.0
    need: float = 0.0


@dataclass(frozen=True, slots=True)
class Option:
    """A plan that was weighed: its share of tokens computed again, its forms (in the order of slots), what it
    promised, and why another one was taken."""

    recompute: float
    forms: tuple[str, ...]
    quality: float
    predicted_ms: float
    reason: str


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a plan expects, in milliseconds.

    `stages`: medians by stage, `total_ms` their sum; `p95_ms`: what 95 % of requests stay below, and
    `promise_ms` what the budget is held against. `table`: the stages before correction by what was measured.
    `calibrated`: whether the machine was measured at all. `fetch_promise`: the part of the
    promise that is about reading files, as a factor on its median.
    """

    stages: Mapping[str, float]
    total_ms: float
    p95_ms: float
    promise_ms: float
    table: Mapping[str, float]
    calibrated: bool = False
    fetch_promise: float = 1.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What goes into the request, in order; every candidate is in `segments` or in `skipped`.

    `quality`: expected share of what the best plan without a budget would give. `gap`: how much more any plan
    could have had at most (0: proven best). `feasible`: whether the budget can be met at all. `rejected`: the
    other options. `notes`: what the caller should know. `actual`: stages as they turned out, `total` among
    them; empty before the first token. `adapter`: the one to bind.
    """

    segments: tuple[Segment, ...]
    skipped: tuple[Skipped, ...]
    recompute: float = 0.0
    budget_ms: float | None = None
    quality: float = 1.0
    gap: float = 0.0
    feasible: bool = True
    forecast: Forecast | None = None
    rejected: tuple[Option, ...] = ()
    notes: tuple[str, ...] = ()
    actual: Mapping[str, float] = field(default_factory=dict)
    adapter: AdapterOption | None = None

    @property
    def tokens(self) -> int:
        return sum(segment.tokens for segment in self.segments)

    def leading(self, form: str) -> list[str]:
        """The memories in the first slots, as far as they all have this form."""
        return [s.cube_id for s in takewhile(lambda segment: segment.form == form, self.segments)]

    @property
    def met(self) -> bool | None:
        """Whether the first token came within the budget; None without one, or before it came."""
        total = self.actual.get("total")
        return None if self.budget_ms is None or total is None else total <= self.budget_ms

    def explain(self) -> list[dict[str, Any]]:
        """One JSON-safe row for each candidate: form `kv`, `text` or `skip`, and the reason."""
        taken = [
            {
                "cube_id": s.cube_id,
                "form": s.form,
                "slot": s.slot,
                "tokens": s.tokens,
                "score": s.score,
                "need": round(s.need, 4),
                "value": round(s.value, 4),
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
                "need": round(s.need, 4),
                "value": 0.0,
                "reason": s.reason,
            }
            for s in self.skipped
        ]
        return taken + left

    def report(self) -> dict[str, Any]:
        """All of it, JSON-safe: the budget, predicted against actual milliseconds by stage, every candidate,
        the options that were not taken."""
        forecast = self.forecast
        predicted = {} if forecast is None else dict(forecast.stages)
        names = dict.fromkeys([*predicted, *(n for n in self.actual if n != "total")])
        return {
            "budget_ms": self.budget_ms,
            "met": self.met,
            "feasible": self.feasible,
            "quality": round(self.quality, 4),
            "gap": round(self.gap, 4),
            "recompute": self.recompute,
            "predicted_ms": None if forecast is None else round(forecast.total_ms, 3),
            "predicted_p95_ms": None if forecast is None else round(forecast.p95_ms, 3),
            "actual_ms": _rounded(self.actual.get("total")),
            "calibrated": forecast is not None and forecast.calibrated,
            "stages": {
                name: {
                    "predicted_ms": _rounded(predicted.get(name)),
                    "actual_ms": _rounded(self.actual.get(name)),
                }
                for name in names
            },
            "memories": self.explain(),
            "rejected": [
                {
                    "recompute": one.recompute,
                    "forms": list(one.forms),
                    "quality": round(one.quality, 4),
                    "predicted_ms": round(one.predicted_ms, 3),
                    "reason": one.reason,
                }
                for one in self.rejected
            ],
            "adapter": None if self.adapter is None else self.adapter.cube_id,
            "notes": list(self.notes),
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
