"""Records of the memories that `bench quality` splices: anchored ones, and averages over left contexts.

Both are encoded when they are first asked for; the oldest go when room is short.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from memos_engine.bench.target import free_bytes
from memos_engine.bench.xquad import MEMORY_TOKENS

from memos_engine.contexts import LONGEST, LeftContext, chosen, fill, fitting
from memos_engine.decoder.averaging import encode_averaged
from memos_engine.decoder.engine import DecoderEngine
from memos_engine.decoder.identity import ids_digest
from memos_engine.decoder.record import KVRecord
from memos_engine.neutral import left_contexts
from memos_engine.prompt import PromptLayout

LEAST_BYTES = 1 << 30
Span = tuple[int, ...]


class RecordCache:
    """Records by their tokens. encode: makes those of several spans at once."""

    def __init__(self, encode: Callable[[Sequence[Span]], Sequence[KVRecord]], nbytes: int) -> None:
        self._encode, self._nbytes = encode, nbytes
        self._kept: OrderedDict[Span, KVRecord] = OrderedDict()

    def get(self, spans: Sequence[Span]) -> tuple[KVRecord, ...]:
        lacking = [span for span in dict.fromkeys(spans) if span not in self._kept]
        for span, record in zip(lacking, self._encode(lacking) if lacking else (), strict=True):
            self._kept[span] = record
        for span in spans:
            self._kept.move_to_end(span)
        found = tuple(self._kept[span] for span in spans)
        while sum(kept.nbytes for kept in self._kept.values()) > self._nbytes and len(self._kept) > 1:
            self._kept.popitem(last=False)
        return found


class Stores:
    """The anchor, and each kind of record behind it.

    owned: all memories of the owner; averages are made behind some of them, chosen as the engine chooses.
    """

    def __init__(
        self, engine: DecoderEngine, layout: PromptLayout, owned: Sequence[Span], nbytes: int | None = None
    ) -> None:
        self.engine, self._left = engine, layout.anchor
        room = engine.spec.max_positions - len(layout.anchor) - 2 * MEMORY_TOKENS
        neutral = [LeftContext(ids, "") for ids in left_contexts(layout, room)]
        named = _named(owned)
        own = [LeftContext(ids, "", sources) for ids, sources in fill(named)] if named else []
        self.contexts = [context.token_ids for context in own or neutral]
        self.anchor = self._record((), layout.anchor)
        few = max(LEAST_BYTES, free_bytes("cpu") // 10) if nbytes is None else nbytes
        many = 4 * few if nbytes is None else nbytes  # an average costs as much as eight of the others
        self._anchored = RecordCache(lambda spans: [self._record(self._left, span) for span in spans], few)
        self._stored = RecordCache(lambda spans: self._averages(spans, own, neutral, room), many)
        self._neutral = RecordCache(lambda spans: self._averages(spans, [], neutral, room), few)

    def anchored(self, spans: Sequence[Span]) -> tuple[KVRecord, ...]:
        return self._anchored.get(spans)

    def stored(self, spans: Sequence[Span]) -> tuple[KVRecord, ...]:
        """What the engine keeps: exact in the first slot, averages behind it."""
        return (*self._anchored.get(spans[:1]), *self._stored.get(spans[1:]))

    def neutral(self, spans: Sequence[Span]) -> tuple[KVRecord, ...]:
        """The same with averages behind statements that belong to nobody."""
        return (*self._anchored.get(spans[:1]), *self._neutral.get(spans[1:]))

    def prepare(self, spans: Sequence[Span], neutral: bool) -> None:
        """Averages many spans together, so that their left contexts are computed once."""
        self._stored.get(spans)
        if neutral:
            self._neutral.get(spans)

    def _record(self, left: Span, span: Span) -> KVRecord:
        k, v = self.engine.encode_span(left, span)
        return KVRecord(k, v, span, "bench", ids_digest(left))

    def _averages(
        self, spans: Sequence[Span], own: Sequence[LeftContext], neutral: Sequence[LeftContext], room: int
    ) -> list[KVRecord]:
        """Of many spans together where they have the same contexts, which are then computed once."""
        alike: dict[tuple[LeftContext, ...], list[Span]] = {}
        for span in spans:
            alike.setdefault(tuple(fitting(own, neutral, _name(span), room)), []).append(span)
        found: dict[Span, KVRecord] = {}
        for contexts, group in alike.items():
            if not contexts:  # none fits a very small window
                found.update(zip(group, self.anchored(group), strict=True))
                continue
            made = encode_averaged(self.engine, self._left, group, [c.token_ids for c in contexts])
            for span, a in zip(group, made, strict=True):
                found[span] = KVRecord(a.k, a.v, span, "bench", "", a.sigma_v, a.rank)
        return [found[span] for span in spans]


def _name(span: Span) -> str:
    return ids_digest(span)


def _named(owned: Sequence[Span]) -> list[tuple[str, Span]]:
    """Those that contexts are made of."""
    spans = {_name(span): span for span in owned}
    return [(name, spans[name]) for name in chosen(list(spans)) if len(spans[name]) <= LONGEST]
