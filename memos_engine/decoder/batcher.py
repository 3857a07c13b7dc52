"""Continuous batching: which requests run, and which of their rows come next. Integers only.

Requests are admitted while pages last, the one first that has to start soonest: in order of arrival where
none has a deadline, and whoever waits long enough comes before those with more time. Every step takes one row
of each request that decodes and a bounded number of prompt rows; where pages run out the youngest request
gives up its own and is replayed later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from memos_engine.config import DecoderConfig
from memos_engine.decoder.blocks import BlockPool, extend_keys
from memos_engine.decoder.sequence import Sequence, Splice, TextSpan
from memos_engine.decoder.session import Session
from memos_engine.decoder.sharing import outside, spliced_pages
from memos_engine.errors import ContextLengthError, OutOfPagesError

Rows = tuple[Sequence, list[int]]


@dataclass(frozen=True)
class Admission:
    """A request that got its pages: page copies `(source, target)` to make, then records to splice. keys: of
    the new pages that others may share once that is done, by page number."""

    sequence: Sequence
    copies: list[tuple[int, int]]
    splices: list[Splice]
    keys: dict[int, bytes]


class Batcher:
    """Waiting and running requests, and idle sessions, over a block pool."""

    def __init__(self, pool: BlockPool, max_positions: int, config: DecoderConfig) -> None:
        self.pool = pool
        self.max_positions = max_positions
        self.config = config
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest admission first
        self.parked: list[Sequence] = []  # without pages, until their caller feeds them
        self.sessions: dict[Session, None] = {}  # least recently used first

    # -- coming and going ------------------------------------------------------------------------

    def add(self, seq: Sequence) -> None:
        """Queues a request; refuses at once what can never run."""
        self.check(seq)
        place = len(self.waiting)
        while (
            place and not self.waiting[place - 1].replayed and self.waiting[place - 1].start_by > seq.start_by
        ):
            place -= 1
        self.waiting.insert(place, seq)

    def check(self, seq: Sequence) -> None:
        """Raises ContextLengthError or OutOfPagesError for a prompt that no empty pool could take."""
        capacity = (self.pool.num_blocks - 1) * self.pool.page
        if seq.prompt_len >= self.max_positions:
            raise ContextLengthError(
                f"The prompt has {seq.prompt_len} tokens; the model's window is {self.max_positions} "
                "including the answer. Shorten the prompt or leave out memories."
            )
        if seq.prompt_len >= capacity:
            raise OutOfPagesError(
                f"The prompt has {seq.prompt_len} tokens; the KV pool holds {capacity}. "
                "Open the engine with a larger pool_tokens."
            )

    def drop(self, seq: Sequence) -> None:
        """Takes a request out, wherever it is, and returns its pages."""
        self._release(seq)
        seq.return_adapter()
        if seq.session is not None and seq.session.request is seq:
            seq.session.request = None
        for place in (self.running, self.parked, self.waiting):
            if seq in place:
                place.remove(seq)

    def finish(self, seq: Sequence) -> None:
        """Publishes what is exact and returns the pages, or hands them to the request's session."""
        self.publish(seq)
        session = seq.session
        if session is not None and not session.closed:
            session.computed, session.epoch = seq.computed, seq.epoch
            session.adapter_state = seq.adapter_state
            session.spans = (*seq.spans, *seq.answer_span())
            session.selected = (*seq.kept, *(seq.selected or ()))
            session.blocks, seq.blocks = seq.blocks, session.blocks
            self.sessions.pop(session, None)
            self.sessions[session] = None
        self.drop(seq)

    def close_session(self, session: Session) -> None:
        """Returns a session's pages; a request of it that is under way ends like any other."""
        session.closed = True
        self.sessions.pop(session, None)
        self._empty(session)

    def publish(self, seq: Sequence) -> None:
        """Offers the computed, exact, full pages to other requests. Safe to repeat."""
        if seq.epoch != self.pool.epoch or not seq.blocks:
            return
        page, limit = self.pool.page, min(seq.exact_tokens, seq.computed)
        extend_keys(seq.keys, seq.root, seq.tokens[:limit], page, *seq.adapter_state)
        for block, key in zip(seq.blocks[: limit // page], seq.keys, strict=False):
            self.pool.publish(block, key)

    # -- admission -------------------------------------------------------------------------------

    def admit(self) -> Admission | None:
        """Starts the next waiting request if there is room for it."""
        if not self.waiting or sum(s.logits is None for s in self.running) >= self.config.max_batch:
            return None
        seq = self.waiting[0]
        reused = self.take_over(seq)
        behind = len(seq.blocks)
        keys = {number: key for number, key in self._page_keys(seq).items() if number >= behind}
        shared = {n: block for n, key in keys.items() if (block := self.pool.find(key)) is not None}
        missing = [n for n in range(behind, -(-len(seq.tokens) // self.pool.page)) if n not in shared]
        whole = reused >= len(seq.tokens)  # the last token must run to give logits: its page becomes ours
        spare = len(self.running)  # those that run will soon want a page each
        if not self._make_room(len(missing) + whole + spare):
            self.pool.release(shared.values())
            self._release(seq)  # it stays at the head of the queue
            return None
        reused -= whole
        copies = (self.own(seq, [reused]) if whole else None) or []
        new = shared | dict(zip(missing, self.pool.allocate(len(missing)), strict=True))
        seq.blocks += [new[number] for number in sorted(new)]
        self.waiting.popleft()
        self.running.append(seq)
        seq.stats.recomputed_tokens = 0
        splices = outside(shared, seq.layout(reused), self.pool.page)
        seq.stats.prefix_tokens = reused
        seq.stats.shared_tokens = len(shared) * self.pool.page
        seq.stats.spliced_tokens = sum(part.count for part in splices)
        seq.stats.computed_tokens = len(seq.pending)
        return Admission(seq, copies, splices, {n: key for n, key in keys.items() if n not in shared})

    def spliced(self, admitted: Admission) -> None:
        """The records are in the pages now: those that hold nothing else may be shared."""
        for number, key in admitted.keys.items():
            self.pool.publish(admitted.sequence.blocks[number], key)

    def _page_keys(self, seq: Sequence) -> dict[int, bytes]:
        """Keys of the pages that the request may share with others: of spliced rows alone, none of which is
        known to be computed again, and not exact (those are in the index under their prefix)."""
        page = self.pool.page
        if not self.config.share_spliced:
            return {}
        if seq.page_keys is None:
            seq.page_keys = spliced_pages(seq.spans, seq.exact // page, page)
        again = {position // page for position in (*seq.kept, *(seq.selected or ()))}
        return {number: key for number, key in seq.page_keys.items() if number not in again}

    def own(self, seq: Sequence, positions: Iterable[int]) -> list[tuple[int, int]] | None:
        """Copy-on-write: the pages of these positions become the request's own, before anything is written.

        Returns the page copies to make, in this order. None where too few pages are free: the request gave up
        its own, and is replayed with what it selected.
        """
        copies = []
        for number in sorted({position // self.pool.page for position in positions}):
            shared = seq.blocks[number]
            own = self._writable(shared)
            if own is None:
                self._preempt(seq)
                return None
            seq.blocks[number] = own
            if own != shared:
                copies.append((shared, own))
        return copies

    def _writable(self, block: int) -> int | None:
        while True:
            try:
                return self.pool.writable(block)
            except OutOfPagesError:
                if not self.give_session_away():
                    return None

    def take_over(self, seq: Sequence) -> int:
        """Gives a request the pages that exist already; returns how many leading tokens they hold."""
        session = seq.session
        seq.epoch = self.pool.epoch
        if session is not None and session.blocks:
            if session.epoch == self.pool.epoch:
                # The session keeps its hold: should the request fail, it stands where it stood. Only rows
                # behind `computed` are written, so the last page needs no copy; pages behind it, if there are
                # any, may be shared.
                if session.adapter_state != seq.adapter_state:
                    return self._take_base(session, seq)
                seq.blocks = session.blocks[: -(-session.computed // self.pool.page)]
                self.pool.acquire(seq.blocks)
                return session.computed
            self._empty(session)
        extend_keys(seq.keys, seq.root, seq.tokens[: seq.exact_tokens], self.pool.page, *seq.adapter_state)
        seq.blocks = self.pool.match(seq.keys)  # held by the request: drop() returns them
        return len(seq.blocks) * self.pool.page

    def check_integrity(self) -> None:
        """Raises IntegrityError unless every page is accounted for."""
        held = [seq.blocks for seq in self.running] + [session.blocks for session in self.sessions]
        self.pool.check_integrity(held)

    def ahead(self) -> list[int]:
        """Prompt rows that each waiting or running request still has to compute."""
        waiting = [seq.prompt_len - seq.kv_tokens for seq in self.waiting]
        return waiting + [len(seq.pending) for seq in self.running if len(seq.pending) > 1]

    def reusable(self, token_ids: Iterable[int], root: bytes) -> int:
        """Leading tokens of an exact prompt whose pages are in the index; nothing is held."""
        keys: list[bytes] = []
        extend_keys(keys, root, list(token_ids), self.pool.page)
        found = self.pool.match(keys)
        self.pool.release(found)
        return len(found) * self.pool.page

    def _take_base(self, session: Session, seq: Sequence) -> int:
        """Of a session whose pages were made under another adapter, those that came before any adapter."""
        starts = [first for state, first in (session.adapter_state, seq.adapter_state) if state]
        whole = min([session.computed, *starts]) // self.pool.page
        seq.stats.adapter_miss = (
            f"{session.computed - whole * self.pool.page} tokens of the session were computed under another "
            "adapter state; they are computed again"
        )
        seq.blocks = session.blocks[:whole]
        self.pool.acquire(seq.blocks)
        return whole * self.pool.page

    def _release(self, seq: Sequence) -> None:
        blocks, seq.blocks = seq.blocks, []
        self.pool.release(blocks)

    def _empty(self, session: Session) -> None:
        blocks, session.blocks = session.blocks, []
        self.pool.release(blocks)

    def _make_room(self, pages: int) -> bool:
        """Sees that `pages` are available: sessions' pages go first, then, if nothing else could move on,
        those of requests that wait for their caller's token."""
        while pages > self.pool.available:
            if self.give_session_away():
                continue
            holders = [s for s in self.running if s.logits is not None]
            if not holders or len(holders) < len(self.running):
                return False
            self._preempt(holders[-1])
            pages -= 1  # its spare page
        return True

    def give_session_away(self) -> bool:
        """Empties the least recently used session, idle ones first; False if none holds pages."""
        holding = [session for session in self.sessions if session.blocks]
        for session in sorted(holding, key=lambda s: s.request is not None)[:1]:
            self._empty(session)
        return bool(holding)

    def _preempt(self, seq: Sequence) -> None:
        """Takes a running request's pages; it is replayed from its plan as soon as there is room."""
        self.publish(seq)  # its exact pages may well survive until then
        self.running.remove(seq)
        self._release(seq)
        seq.pending = []
        seq.stats.preemptions += 1
        if seq.logits is not None:
            self.parked.append(seq)
        else:
            self.waiting.appendleft(seq)

    def as_text(self) -> None:
        """After an exchange of weights: stored KV of the old ones must not be spliced again, so whatever
        goes on goes on as text, from its first token."""
        for seq in reversed(self.running[:]):
            self._preempt(seq)
        for seq in (*self.waiting, *self.parked):
            seq.as_text()
        for session in self.sessions:
            self._empty(session)
            session.spans = tuple(TextSpan(span.token_ids) for span in session.spans)
            session.selected = ()

    def fed(self, seq: Sequence) -> None:
        """A request got its next token from its caller."""
        if seq in self.parked:
            self.parked.remove(seq)
            self.waiting.appendleft(seq)
        else:
            seq.pending = [len(seq.tokens) - 1]

    # -- rows ------------------------------------------------------------------------------------

    def next_rows(self) -> list[Rows]:
        """The rows of the next forward: one of each decoding request, then prompt rows.

        A prompt alone gets `prefill_chunk` rows; beside decoding requests, which wait for the step,
        `prefill_beside`. Half goes to the oldest prompt and the rest to the shortest ones, so that none
        starves and short ones do not wait behind long ones.
        """
        rows: list[Rows] = []
        for seq in list(self.running):
            if len(rows) == self.config.max_batch:
                break
            if len(seq.pending) == 1 and seq in self.running and self._has_page(seq):
                rows.append((seq, seq.pending[:]))
        prompts = [s for s in self.running if len(s.pending) > 1]
        if not prompts:
            return rows
        budget = self.config.prefill_beside if rows else self.config.prefill_chunk
        oldest, younger = prompts[0], sorted(prompts[1:], key=lambda s: len(s.pending))
        shares = {oldest: budget if not younger else min(len(oldest.pending), -(-budget // 2))}
        left = budget - shares[oldest]
        for seq in younger:
            shares[seq] = min(left, len(seq.pending))
            left -= shares[seq]
        shares[oldest] += left
        return rows + [(s, s.pending[:n]) for s, n in shares.items() if n > 0]

    def _has_page(self, seq: Sequence) -> bool:
        """Sees that the page of a decoding request's newest row is there; False if it gave up its own."""
        while seq.pending[-1] // self.pool.page >= len(seq.blocks):
            if self.pool.available or self.give_session_away():
                seq.blocks += self.pool.allocate(1)
                continue
            if len(self.running) == 1:
                seq.blocks += self.pool.allocate(1)  # raises: somebody outside holds the rest
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        return True
