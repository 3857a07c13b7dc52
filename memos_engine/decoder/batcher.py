"""Which request runs next, and which of its rows: admission by free pages, chunked prefill.

Integers only. One request runs at a time; the others wait in order of arrival.
"""

from __future__ import annotations

from collections import deque

from memos_engine.decoder.blocks import BlockPool, chain_keys
from memos_engine.decoder.sequence import Sequence, Splice
from memos_engine.errors import ContextLengthError, OutOfPagesError


class Batcher:
    """Waiting and running requests over a block pool."""

    def __init__(self, pool: BlockPool, max_positions: int, chunk: int) -> None:
        self.pool = pool
        self.max_positions = max_positions
        self.chunk = chunk
        self.waiting: deque[Sequence] = deque()
        self.running: Sequence | None = None

    def add(self, seq: Sequence) -> None:
        """Queues a request; refuses at once what can never run."""
        self.check(seq)
        self.waiting.append(seq)

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

    def admit(self) -> tuple[Sequence, list[Splice], list[tuple[int, int]]] | None:
        """Starts the next waiting request if nothing runs.

        Returns it with the splices to do and the page copies `(source, target)` to make first.
        """
        if self.running is not None or not self.waiting:
            return None
        seq = self.waiting.popleft()
        page = self.pool.page
        seq.epoch = self.pool.epoch
        keys = chain_keys(seq.root, seq.tokens[: seq.exact], page)
        seq.blocks = self.pool.match(keys)  # held by the request: drop() returns them
        copies: list[tuple[int, int]] = []
        reused = len(seq.blocks) * page
        if reused >= seq.prompt_len:  # the last token must run to give logits: its page becomes ours
            shared = seq.blocks[-1]
            seq.blocks[-1] = self.pool.writable(shared)
            if seq.blocks[-1] != shared:
                copies.append((shared, seq.blocks[-1]))
            reused = seq.prompt_len - 1
        seq.blocks += self.pool.allocate(-(-seq.prompt_len // page) - len(seq.blocks))
        splices = seq.layout(reused)
        seq.stats.prefix_tokens = reused
        seq.stats.spliced_tokens = sum(s.record.num_tokens - s.skip for s in splices)
        seq.stats.computed_tokens = len(seq.pending)
        self.running = seq
        return seq, splices, copies

    def next_rows(self, seq: Sequence) -> list[int]:
        """Positions to compute now: the next chunk of the prompt, or the newest token."""
        if seq.pending:
            rows, seq.pending = seq.pending[: self.chunk], seq.pending[self.chunk :]
            return rows
        position = len(seq.tokens) - 1
        if position // self.pool.page >= len(seq.blocks):
            seq.blocks += self.pool.allocate(1)
        return [position]

    def finish(self, seq: Sequence, computed: int) -> None:
        """Publishes what is exact among the first `computed` tokens and returns the pages."""
        limit = computed if seq.fully_exact else min(seq.exact, computed)
        if seq.epoch != self.pool.epoch:
            limit = 0
        for block, key in zip(
            seq.blocks, chain_keys(seq.root, seq.tokens[:limit], self.pool.page), strict=False
        ):
            self.pool.publish(block, key)
        self.drop(seq)

    def drop(self, seq: Sequence) -> None:
        """Returns all pages of a request, publishing nothing more."""
        blocks, seq.blocks = seq.blocks, []
        self.pool.release(blocks)
        if self.running is seq:
            self.running = None
        elif seq in self.waiting:
            self.waiting.remove(seq)
