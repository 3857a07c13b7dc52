"""A request on its way through the decoder: its spans, its pages, what is still to compute."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from memos_engine.config import Recompute, SamplingParams
from memos_engine.decoder.adapters import AdapterBinding
from memos_engine.decoder.identity import ids_digest
from memos_engine.decoder.recompute import Placed, Probe, by_rank, probe
from memos_engine.decoder.record import KVRecord
from memos_engine.errors import AdapterError, MemoryInputError

if TYPE_CHECKING:
    from memos_engine.decoder.session import Session

_ids = itertools.count(1)
NO_TOKEN = -1
NOTHING = Recompute()
PATIENCE_S = 2.0  # a request without a deadline waits as if it had to start this long after it came


@dataclass(frozen=True)
class TextSpan:
    """Tokens the decoder computes."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class KVSpan:
    """Tokens whose K and V come from a stored record. memory: False for what counts as no memory (the
    anchor)."""

    record: KVRecord
    memory: bool = True

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.record.token_ids


Span = TextSpan | KVSpan


def require_known_ids(spans: Seq[Span], vocab: int) -> None:
    """Raises MemoryInputError for text with ids outside a vocabulary."""
    for span in spans:
        ids = span.token_ids if isinstance(span, TextSpan) else ()
        if ids and (min(ids) < 0 or max(ids) >= vocab):
            raise MemoryInputError(f"A token id is outside the model's vocabulary of {vocab}.")


@dataclass(frozen=True)
class Splice:
    """Rows `skip ...` of a record, up to row `stop` (all that follow: None), go to positions `start ...`."""

    record: KVRecord
    start: int
    skip: int = 0
    stop: int | None = None

    @property
    def count(self) -> int:
        """Rows to write."""
        return (self.record.num_tokens if self.stop is None else self.stop) - self.skip


@dataclass
class Stats:
    """What a request cost, in milliseconds on the wall clock; tokens by how they got there.

    queue_ms: before it was admitted. prefill_ms: the forwards up to the first token (shared with whatever
    else ran in them); probe_ms: how much of that went before the tokens to compute again were known.
    computed_tokens counts recomputed_tokens too, memory tokens from a record that were computed again.
    spliced_tokens were written for this request, shared_tokens found in pages that were spliced before.
    preemptions: how often its pages were taken and its plan replayed; the token counts are those of the last
    admission. adapter_miss: why KV that was there could not be used under this request's adapter, empty where
    none was refused.
    """

    created: float = field(default_factory=time.perf_counter)
    queue_ms: float = 0.0
    splice_ms: float = 0.0
    probe_ms: float = 0.0
    prefill_ms: float = 0.0
    ttft_ms: float = 0.0
    total_ms: float = 0.0
    prefix_tokens: int = 0
    spliced_tokens: int = 0
    shared_tokens: int = 0
    computed_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0
    adapter_miss: str = ""

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
    full prefill; the prefix index may hold only pages made of them. in_place: leading tokens whose records
    were encoded behind just the tokens that stand there now; they are not worth computing again. probe:
    present until the first pass is over. start_by: when it should be admitted at the latest, on the clock of
    `time.perf_counter`. selected: positions of spliced tokens to compute again, None until
    a first pass has found them; kept: those of the session's earlier requests. page_keys: of the pages of
    spliced rows alone, by page number; None until they were needed.
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
        recompute: Recompute = NOTHING,
        start_by: float | None = None,
        adapter: AdapterBinding | None = None,
        layers: int = 0,
    ) -> None:
        if not spans or not isinstance(spans[-1], TextSpan) or not spans[-1].token_ids:
            raise MemoryInputError("A prompt must end in at least one token of text.")
        self.id = next(_ids)
        before = session.spans if session else ()
        self.recompute = recompute
        if recompute.share == 1.0:
            spans = [TextSpan(s.token_ids) if isinstance(s, KVSpan) and s.memory else s for s in spans]
        self.spans: tuple[Span, ...] = (*before, *spans)
        self.first_own = sum(len(span.token_ids) for span in before)
        self.kept: tuple[int, ...] = session.selected if session else ()
        self.selected: tuple[int, ...] | None = ()
        self.probe: Probe | None = None
        self.params = params
        self.root = root
        self.sampled = sampled
        self.session = session
        self.on_output = on_output
        self.tokens: list[int] = [t for span in self.spans for t in span.token_ids]
        self.prompt_len = len(self.tokens)
        self.exact, self.in_place = self._lengths()
        self.adapter, self.slot = adapter, -1
        self.on_return: Callable[[], None] | None = None  # gives the adapter back
        self.adapter_state = (
            adapter.state(layers) if adapter else b"",
            adapter.active_from if adapter else 0,
        )
        if not self.adapter_state[0]:
            self.adapter_state = (b"", 0)
        self.adapter_approximate = False
        self.page_keys: dict[int, bytes] | None = None
        self._meet_adapter()
        self.keys: list[bytes] = []  # of the full exact pages, as far as they were needed
        self.blocks: list[int] = []
        self.pending: list[int] = []
        self.logits: Tensor | None = None  # [vocab] float32, where the caller chooses the next token
        self.epoch = 0
        self.finish_reason: str | None = None  # stop, length, error or abort
        self.error: BaseException | None = None
        self.stats = Stats()
        self.start_by = self.stats.created + PATIENCE_S if start_by is None else start_by
        if 0 < recompute.share < 1:
            self._select()

    def return_adapter(self) -> None:
        """At the request's end. Safe to repeat."""
        back, self.on_return = self.on_return, None
        if back is not None:
            back()

    def _meet_adapter(self) -> None:
        """Stored spans must have been made under the adapter state that they are read under; where they were
        not, and the binding allows it, they end what is exact."""
        state, active = self.adapter_state
        start = 0
        for span in self.spans:
            end = start + len(span.token_ids)
            if isinstance(span, KVSpan):
                wanted = state.hex() if state and start >= active else ""
                straddles = bool(state) and start < active < end
                if straddles or span.record.adapter != wanted:
                    if self.adapter is None or not self.adapter.approximate:
                        made = span.record.adapter[:12] or "no adapter"
                        raise AdapterError(
                            f"The stored span at positions {start} to {end} was made under {made}, but the "
                            f"request reads it under {wanted[:12] or 'no adapter'}. Let the adapter act from "
                            "behind it (active_from), give the span as text, or allow approximate=True."
                        )
                    self.exact, self.in_place = min(self.exact, start), min(self.in_place, start)
                    self.adapter_approximate, self.page_keys = True, {}
            start = end

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_len :]

    @property
    def kv_tokens(self) -> int:
        return sum(len(span.token_ids) for span in self.spans if isinstance(span, KVSpan))

    @property
    def replayed(self) -> bool:
        """Whether its pages were taken: it was admitted before those that wait, and stays before them."""
        return self.stats.preemptions > 0

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
        self.exact, self.in_place, self.keys = self.prompt_len, self.prompt_len, []
        self.kept, self.selected, self.probe, self.page_keys = (), (), None, None
        self.adapter_approximate = False

    def answer_span(self) -> tuple[Span, ...]:
        """The answer as text, for those who go on behind it."""
        return (TextSpan(tuple(self.output)),) if self.output else ()

    def _lengths(self) -> tuple[int, int]:
        """Leading tokens that are exact, and those that stand where they were encoded.

        A stored span stands where it was encoded behind just the tokens of then; it is exact, too, unless it
        was made smaller. Text is exact behind exact tokens. The first approximate span ends the chain.
        """
        end, exact = 0, None
        for span in self.spans:
            if isinstance(span, KVSpan):
                if span.record.left != ids_digest(self.tokens[:end]):
                    break
                if span.record.quantized and exact is None:
                    exact = end
            end += len(span.token_ids)
        return (end if exact is None else exact), end

    def layout(self, reused: int) -> list[Splice]:
        """Sets `pending` and returns the splices, the first `reused` tokens being in pages already.

        Where tokens are to be computed again, they are in `pending` if they are known; otherwise there is a
        `probe`, and `refine` puts them there after the first pass.
        """
        splices: list[Splice] = []
        start = 0
        self.pending = []
        for span in self.spans:
            end = start + len(span.token_ids)
            first = max(start, reused)
            if isinstance(span, TextSpan):
                self.pending.extend(range(first, end))
            elif first < end:
                splices.append(Splice(span.record, first, first - start))
            start = end
        self.pending.extend(range(max(start, reused), len(self.tokens)))  # a replayed answer
        self.probe = None
        if self.selected is None:
            query = self.prompt_len - len(self.spans[-1].token_ids)
            self.probe = probe(*self._candidates(), first_row=query)
        self._compute_again(p for p in (*self.kept, *(self.selected or ())) if p >= reused)
        return splices

    def _candidates(self) -> tuple[list[Placed], int]:
        """This request's own memories that are not in place, and how many tokens to compute again."""
        placed: list[Placed] = []
        start = memory_tokens = 0
        for span in self.spans:
            if isinstance(span, KVSpan) and span.memory and start >= self.first_own:
                memory_tokens += len(span.token_ids)
                if start >= self.in_place:
                    placed.append((start, span.record))
            start += len(span.token_ids)
        return placed, round(self.recompute.share * memory_tokens)

    def _select(self) -> None:
        """Chooses what to compute again, or leaves it to a first pass."""
        placed, budget = self._candidates()
        if placed and budget:
            self.selected = by_rank(placed, budget) if self.recompute.by == "rank" else None

    def refine(self) -> None:
        """After the first pass: what it found is pending, and all text behind that once more."""
        assert self.probe is not None
        self.selected, self.probe = self.probe.selected(), None
        if self.selected:
            text: list[int] = []
            start = 0
            for span in self.spans:
                end = start + len(span.token_ids)
                if isinstance(span, TextSpan):
                    text += range(max(start, self.selected[0]), end)
                start = end
            self.pending = text
            self._compute_again(self.selected)  # what earlier requests chose lies before all this

    def _compute_again(self, positions: Iterable[int]) -> None:
        again = set(positions)
        if again:
            self.pending = sorted(again.union(self.pending))
        self.stats.recomputed_tokens += len(again)
