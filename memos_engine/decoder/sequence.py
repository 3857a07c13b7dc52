"""A request on its way through the decoder: its spans, its pages, what is still to compute."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from memos_engine.config import SamplingParams
from memos_engine.decoder.record import KVRecord, ids_digest
from memos_engine.errors import MemoryInputError

if TYPE_CHECKING:
    from memos_engine.decoder.session import Session

_ids = itertools.count(1)
NO_TOKEN = -1


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
    """What a request cost, in milliseconds on the wall clock; tokens by how they got there.

    prefill_ms: the forwards up to the first token (shared with whatever else ran in them). preemptions: how
    often its pages were taken and its plan replayed; the token counts are those of the last admission.
    """

    created: float = field(default_factory=time.perf_counter)
    splice_ms: float = 0.0
    prefill_ms: float = 0.0
    ttft_ms: float = 0.0
    total_ms: float = 0.0
    prefix_tokens: int = 0
    spliced_tokens: int = 0
    computed_tokens: int = 0
    preemptions: int = 0

    def since_created(self) -> float:
        return (time.perf_counter() - self.created) * 1e3


@dataclass(frozen=True)
class StepOutput:
    """What a step did for a request: a new token, or its end without one.

    token: NO_TOKEN where the request now waits for its caller (`logits` is set), or ended by an error.
    finish_reason: stop, length, error, or None: it goes on.
    """

    sequence: Sequence
    token: int
    finish_reason: str | None


class Sequence:
    """One request. The last span is text: its last token gives the first logits.

    tokens: prompt, then answer. blocks: pages by position. pending: positions still to compute, ascending;
    empty while the request waits for a token. exact: leading prompt tokens whose K and V equal those of a
    full prefill; the prefix index may hold only pages made of them.
    """

    def __init__(
        self,
        spans: Seq[Span],
        params: SamplingParams,
        root: bytes = b"",
        *,
        sampled: bool = True,
        session: Session | None = None,
        on_output: Callable[[StepOutput], None] | None = None,
    ) -> None:
        if not spans or not isinstance(spans[-1], TextSpan) or not spans[-1].token_ids:
            raise MemoryInputError("A prompt must end in at least one token of text.")
        self.id = next(_ids)
        self.spans: tuple[Span, ...] = (*(session.spans if session else ()), *spans)
        self.params = params
        self.root = root
        self.sampled = sampled
        self.session = session
        self.on_output = on_output
        self.tokens: list[int] = [t for span in self.spans for t in span.token_ids]
        self.prompt_len = len(self.tokens)
        self.exact = self._exact_length()
        self.keys: list[bytes] = []  # of the full exact pages, as far as they were needed
        self.blocks: list[int] = []
        self.pending: list[int] = []
        self.logits: Tensor | None = None  # [vocab] float32, where the caller chooses the next token
        self.epoch = 0
        self.finish_reason: str | None = None  # stop, length, error or abort
        self.error: BaseException | None = None
        self.stats = Stats()

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_len :]

    @property
    def fully_exact(self) -> bool:
        return self.exact == self.prompt_len

    @property
    def exact_tokens(self) -> int:
        """Leading tokens of prompt and answer that are exact once computed."""
        return len(self.tokens) if self.fully_exact else self.exact

    @property
    def computed(self) -> int:
        """Leading tokens whose K and V are in the pages."""
        return self.pending[0] if self.pending else len(self.tokens)

    def as_text(self) -> None:
        """Every span becomes text: what was stored for it counts no longer."""
        self.spans = tuple(TextSpan(span.token_ids) for span in self.spans)
        self.exact, self.keys = self.prompt_len, []

    def answer_span(self) -> tuple[Span, ...]:
        """The answer as text, for those who go on behind it."""
        return (TextSpan(tuple(self.output)),) if self.output else ()

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
        """Sets `pending` and returns the splices, the first `reused` tokens being in pages already."""
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
        self.pending.extend(range(max(start, reused), len(self.tokens)))  # a replayed answer
        return splices
