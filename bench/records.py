"""Records of the memories that `bench quality` splices: anchored ones, and averages over left contexts.

Both are encoded when they are first asked for; the oldest go when room is short.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from memos_engine.decoder.averaging import encode_averaged
from memos_engine.decoder.engine import DecoderEngine
from memos_engine.decoder.identity import ids_digest
from memos_engine.decoder.record import KVRecord

RECORD_BYTES = 2 << 30  # of each kind
Span = tuple[int, ...]


class RecordCache:
    """Records by their tokens. encode: makes those of several spans at once."""

    def __init__(
        self, encode: Callable[[Sequence[Span]], Sequence[KVRecord]], nbytes: int = RECORD_BYTES
    ) -> None:
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
    """The anchor, and both kinds of records behind it."""

    def __init__(
        self, engine: DecoderEngine, anchor: Span, contexts: Sequence[Span], nbytes: int = RECORD_BYTES
    ) -> None:
        self.engine, self._left, self._contexts = engine, anchor, contexts
        self.anchor = self._record((), anchor)
        self._anchored = RecordCache(lambda spans: [self._record(anchor, span) for span in spans], nbytes)
        self._averaged = RecordCache(self._averages, nbytes)

    def anchored(self, spans: Sequence[Span]) -> tuple[KVRecord, ...]:
        return self._anchored.get(spans)

    def stored(self, spans: Sequence[Span]) -> tuple[KVRecord, ...]:
        """What the engine keeps: exact in the first slot, averages behind it."""
        return (*self._anchored.get(spans[:1]), *self._averaged.get(spans[1:]))

    def prepare(self, spans: Sequence[Span]) -> None:
        """Averages many spans together, so that their left contexts are computed once."""
        self._averaged.get(spans)

    def _record(self, left: Span, span: Span) -> KVRecord:
        k, v = self.engine.encode_span(left, span)
        return KVRecord(k, v, span, "bench", ids_digest(left))

    def _averages(self, spans: Sequence[Span]) -> list[KVRecord]:
        if not self._contexts:  # none fits a very small window
            return list(self.anchored(spans))
        made = encode_averaged(self.engine, self._left, spans, self._contexts)
        pairs = zip(made, spans, strict=True)
        return [KVRecord(a.k, a.v, span, "bench", "", a.sigma_v, a.rank) for a, span in pairs]
