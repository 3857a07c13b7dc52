"""The block pool as a state machine: no page is ever lost, shared by accident or served for other tokens."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from memos_engine.decoder.blocks import BlockPool, chain_keys
from memos_engine.errors import IntegrityError, OutOfPagesError

PAGE = 4


class PoolMachine(RuleBasedStateMachine):
    """Requests that come, match, allocate, publish, fork and go, against a model of what each page holds."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(9, PAGE)
        self.holders: list[tuple[list[int], tuple[int, ...]]] = []
        self.content: dict[int, bytes] = {}

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=20).map(tuple), publish=st.booleans())
    def request(self, tokens, publish):
        keys = chain_keys(b"root", tokens, PAGE)
        matched = self.pool.match(keys)
        for block, key in zip(matched, keys, strict=False):
            assert self.content[block] == key, "a page was served for other tokens"
        need = -(-len(tokens) // PAGE) - len(matched)
        try:
            fresh = self.pool.allocate(need)
        except OutOfPagesError:
            assert need > self.pool.available
            self.pool.release(matched)
            return
        blocks = matched + fresh
        for block in fresh:
            self.content.pop(block, None)
        if publish:
            for block, key in zip(blocks, keys, strict=False):
                self.pool.publish(block, key)
                self.content.setdefault(block, key)
        self.holders.append((blocks, tokens))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def leave(self, data):
        blocks, _ = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.pool.release(blocks)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def write_last_page(self, data):
        blocks, _ = self.holders[data.draw(st.integers(0, len(self.holders) - 1))]
        try:
            fresh = self.pool.writable(blocks[-1])
        except OutOfPagesError:
            return
        others = [b for held, _ in self.holders if held is not blocks for b in held]
        assert fresh not in others
        if fresh != blocks[-1]:
            self.content.pop(fresh, None)
        blocks[-1] = fresh

    @rule()
    def forget(self):
        self.pool.forget()

    @invariant()
    def sound(self):
        self.pool.check_integrity([blocks for blocks, _ in self.holders])


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_releasing_twice_is_found():
    pool = BlockPool(4, PAGE)
    (block,) = pool.allocate(1)
    pool.release([block])
    with pytest.raises(IntegrityError):
        pool.release([block])


def test_a_lost_reference_is_found():
    pool = BlockPool(4, PAGE)
    pool.allocate(1)
    with pytest.raises(IntegrityError, match="holders"):
        pool.check_integrity([])


def test_allocation_is_all_or_none():
    pool = BlockPool(4, PAGE)
    pool.allocate(2)
    with pytest.raises(OutOfPagesError, match="pool_tokens"):
        pool.allocate(2)
    assert pool.available == 1


def test_chain_keys_depend_on_all_that_stands_left():
    base = chain_keys(b"r", list(range(12)), PAGE)
    assert len(base) == 3
    assert chain_keys(b"r", [9, *range(1, 12)], PAGE)[2] != base[2]
    assert chain_keys(b"s", list(range(12)), PAGE)[0] != base[0]
    assert chain_keys(b"r", list(range(11)), PAGE) == base[:2]
