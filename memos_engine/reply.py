"""What goes in and out of a request: the prepared spans, the reply, the stream of its text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from memos_engine.decoder.engine import StepOutput
from memos_engine.decoder.sequence import Span, Stats
from memos_engine.memory.cube import MemCube
from memos_engine.memory.governance import Principal
from memos_engine.memory.plan import Plan
from memos_engine.outlook import Surroundings
from memos_engine.parameter import AdapterUse


@dataclass(frozen=True)
class Prepared:
    """A request ready for the decoder: its spans, the plan behind them, and what preparing cost. lacking:
    memories of the plan, or that only time kept out of it, that lack a record. whole: the spans are the whole
    prompt, no conversation stands before them. start: when the call began, on the clock of
    `time.perf_counter`. around: what the plan was made for. schedule_ms: what deciding took, a part of
    planning. adapter: what the plan binds.
    """

    spans: list[Span]
    plan: Plan
    principal: Principal
    lacking: list[MemCube]
    timings: dict[str, float]
    whole: bool = True
    start: float = 0.0
    around: Surroundings | None = None
    schedule_ms: float = 0.0
    adapter: AdapterUse | None = None


@dataclass(frozen=True)
class Reply:
    """An answer and how it came about.

    ttft_ms: from the call to the first token, retrieval included. timings: milliseconds by stage (retrieve,
    fetch, plan, splice, prefill). plan: every candidate memory, the form chosen and why, the time foreseen
    and taken (`plan.report()`). adapter: which one was active, or why the one asked for was not; empty where
    none was asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    ttft_ms: float
    total_ms: float
    plan: Plan
    stats: Stats
    timings: dict[str, float] = field(default_factory=dict)
    adapter: str = ""

    @property
    def forms(self) -> dict[str, str]:
        """Memory id to the form it entered in."""
        return {segment.cube_id: segment.form for segment in self.plan.segments}


class TextStream:
    """Decodes token by token, holding back bytes that are not yet a whole character."""

    def __init__(self, tokenizer: Any, stops: tuple[int, ...], write: Callable[[str], None]) -> None:
        self.tokenizer, self.stops, self.write = tokenizer, stops, write
        self.ids: list[int] = []
        self.shown = 0

    def __call__(self, out: StepOutput) -> None:
        if out.token in self.stops:
            return
        self.ids.append(out.token)
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            self._show(text)

    def close(self) -> None:
        """Shows what was held back, when no further token can complete it."""
        self._show(self.tokenizer.decode(self.ids, skip_special_tokens=True))

    def _show(self, text: str) -> None:
        if len(text) > self.shown:
            self.write(text[self.shown :])
            self.shown = len(text)
