"""A request on its way through the decoder: its spans, its pages, what is still to compute."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from memos_engine.config import SamplingParams
from memos_engine.decoder.record import KVRecord, ids_digest
from memos_engine.errors import MemoryInputError

_ids = itertools.count(1)


@dataclass(frozen=True)
class TextSpan:
    """Tokens the decoder computes."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class KVSpan:
    """Tokens whose K and V come from a stored record."""

    record: KVRecord

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.record.token_ids


Span = TextSpan | KVSpan


@dataclass(frozen=True)
class Splice:
    """Rows `skip ...` of a record go to positions `start ...`."""

    record: KVRecord
    start: int
    skip: int = 0


@dataclass
class Stats:
    """What a request cost, in milliseconds on the wall clock; tokens by how they got there."""

    created: float = field(default_factory=time.perf_counter)
    splice_ms: float = 0.0
    prefill_ms: float = 0.0
    ttft_ms: float = 0.0
    total_ms: float = 0.0
    prefix_tokens: int = 0
    spliced_tokens: int = 0
    computed_tokens: int = 0

    def since_created(self) -> float:
        return (time.perf_counter() - self.created) * 1e3


class Sequence:
    """One request. The last span is text: its last token gives the first logits.

    tokens: prompt, then answer. blocks: pages by position. pending: prompt positions still to compute,
    ascending. exact: leading tokens whose K and V equal those of a full prefill; the prefix index may hold
    only pages made of them.
    """

    def __init__(self, spans: Seq[Span], params: SamplingParams, root: bytes = b"") -> None:
        if not spans or not isinstance(spans[-1], TextSpan) or not spans[-1].token_ids:
            raise MemoryInputError("A prompt must end in at least one token of text.")
        self.id = next(_ids)
        self.spans = tuple(spans)
        self.params = params
        self.root = root
        self.tokens: list[int] = [t for span in spans for t in span.token_ids]
        self.prompt_len = len(self.tokens)
        self.exact = self._exact_length()
        self.blocks: list[int] = []
        self.pending: list[int] = []
        self.epoch = 0
        self.finish_reason: str | None = None  # stop, length or abort
        self.error: BaseException | None = None
        self.stats = Stats()

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_len :]

    @property
    def fully_exact(self) -> bool:
        return self.exact == self.prompt_len

    def _exact_length(self) -> int:
        """A stored span is exact where just what it was encoded behind stands to its left, itself exact;
        text is exact behind exact tokens. The first approximate span ends the chain."""
        end = 0
        for span in self.spans:
            if isinstance(span, KVSpan) and span.record.left != ids_digest(self.tokens[:end]):
                return end
            end += len(span.token_ids)
        return end

    def layout(self, reused: int) -> list[Splice]:
        """Sets `pending` and returns the splices, the first `reused` tokens being in shared pages."""
        splices, start = [], 0
        self.pending = []
        for span in self.spans:
            end = start + len(span.token_ids)
            first = max(start, reused)
            if isinstance(span, KVSpan) and first < end:
                splices.append(Splice(span.record, first, first - start))
            elif isinstance(span, TextSpan):
                self.pending.extend(range(first, end))
            start = end
        return splices
