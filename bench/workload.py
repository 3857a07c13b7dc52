"""The prompt that is timed: an anchor, memories of a chosen size, a question."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from memos_engine.bench.target import Target
from memos_engine.bench.texts import facts

from memos_engine.config import SYSTEM_PROMPT, ConfigError
from memos_engine.prompt import PromptLayout, load_tokenizer

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """Token ids. spans: one complete chat turn per memory."""

    anchor: Ids
    spans: tuple[Ids, ...]
    query: Ids

    def parts(self, order: Sequence[int], asked: int = 0) -> list[list[int]]:
        """Anchor, memories in this order, query. asked: another number gives another question of the same
        length, so that no cache knows it."""
        query = list(self.query)
        if asked:
            middle = query[: max(0, len(query) - 16)]
            random.Random(asked).shuffle(middle)
            query[: len(middle)] = middle
        return [list(self.anchor), *(list(self.spans[i]) for i in order), query]


class Workloads:
    """Makes workloads for one target; a model without a tokenizer (random weights) gets random ids."""

    def __init__(self, target: Target, seed: int) -> None:
        self.target, self.seed = target, seed
        self.layout = None if target.random else PromptLayout(load_tokenizer(target.folder), SYSTEM_PROMPT)

    def make(self, context: int, query: int, memories: int) -> Workload:
        """`context` memory tokens split evenly over `memories` spans, `query` tokens behind them."""
        if context < 16 * memories:
            raise ConfigError(
                f"context {context}: at least 16 tokens for each of the {memories} memories "
                f"({16 * memories}); use a longer --context or fewer --memories."
            )
        sizes = [context // memories + (i < context % memories) for i in range(memories)]
        if self.layout is None:
            rng, vocab = random.Random(self.seed), self.target.spec.vocab_size

            def draw(count: int) -> Ids:
                return tuple(rng.randrange(3, vocab) for _ in range(count))

            return Workload(draw(32), tuple(draw(size) for size in sizes), draw(query))
        close = len(self.layout.turn_close)
        base = 1000 * self.seed
        spans = [
            _exactly(self.layout.memory(facts(base + i, size)), size, close) for i, size in enumerate(sizes)
        ]
        question = "Where does Anna live? " * (1 + query // 5)
        return Workload(
            self.layout.anchor,
            tuple(spans),
            _exactly(self.layout.query(question), query, tail=close + 10),
        )


def _exactly(ids: Ids, size: int, tail: int) -> Ids:
    """A span of just `size` tokens: its middle is cut, its last `tail` tokens (the end of the turn) stay."""
    if len(ids) < size:
        raise ConfigError(f"{size} tokens were asked for, the text gives {len(ids)}; ask for fewer.")
    tail = min(tail, size)
    return ids[: size - tail] + ids[len(ids) - tail :]
