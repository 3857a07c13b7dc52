"""What memories are encoded behind: the owner's own memories where there are enough, else neutral ones."""

from __future__ import annotations

import sqlite3

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_engine import DecoderConfig, MemoryConfig, MemoryEngine
from memos_engine.activation import AVERAGED
from memos_engine.config import ConfigError
from memos_engine.contexts import FEWEST, MOST, TOKENS, USED, chosen, fill
from memos_engine.memory.embed import HashingEmbedder
from memos_engine.neutral import left_contexts

WINDOW = 10_000


@pytest.fixture
def engine(tiny_folder, tmp_path):
    config = MemoryConfig(min_score=-1.0, distraction=0.0)
    decoder = DecoderConfig(dtype="float32")
    embedder = HashingEmbedder(64)
    with MemoryEngine.open(
        tiny_folder, tmp_path / "store", decoder=decoder, memory=config, embedder=embedder
    ) as opened:
        yield opened
        opened.decoder.check_integrity()


def memories(user, count, first=0):
    """Each of some 40 tokens in the tiny model's alphabet, so that contexts have many of them."""
    return [user.remember(f"note {i} is on page {i * 7}") for i in range(first, first + count)]


def sources(engine, user):
    left = engine.activation.left
    left.refresh(user.principal)
    return [context.sources for context in left.of(user.principal, "", WINDOW)]


def rows(engine, statement):
    with sqlite3.connect(engine.store.directory / "memory.db") as conn:
        return conn.execute(statement).fetchall()


def stored(engine, user, cube):
    return engine.activation.find(user.principal, cube, engine.layout.memory(cube.body)).records


@given(st.integers(0, 3 * MOST))
def test_what_is_chosen_changes_seldom(count):
    names = [f"memory {i}" for i in range(count)]
    picked = chosen(names)
    assert len(picked) == (0 if count < FEWEST else min(USED, FEWEST if count < 4 * FEWEST else USED))
    assert len(set(picked)) == len(picked)
    assert set(picked) <= set(names)
    within = [size for size in (FEWEST, 4 * FEWEST, 16 * FEWEST, MOST) if size <= count]
    assert picked == (chosen(names[: within[-1]]) if within else [])


@given(st.lists(st.integers(1, 700), min_size=1, max_size=64))
def test_contexts_are_as_long_as_they_must_be_and_name_their_memories(sizes):
    spans = [(str(i), (i,) * size) for i, size in enumerate(sizes)]
    most = -(-len(sizes) // 4)
    made = fill(spans)
    assert len(made) == len(TOKENS)
    for wanted, (ids, names) in zip(TOKENS, made, strict=True):
        assert len(ids) < wanted + max(sizes)
        assert len(ids) >= wanted or len(names) == most
        assert names == {str(token) for token in ids}
        assert len(names) <= most
    if len(sizes) % 4 == 0:
        assert max(sum(str(i) in names for _, names in made) for i in range(len(sizes))) <= 2


def test_own_memories_stand_to_the_left_once_there_are_enough(engine):
    alice, bob = engine.user("alice"), engine.user("bob")
    memories(bob, FEWEST)
    cubes = memories(alice, FEWEST - 1)
    assert not any(sources(engine, alice))
    cubes += memories(alice, 1, FEWEST)
    found = sources(engine, alice)
    assert len(found) == len(TOKENS)
    assert frozenset().union(*found) <= {cube.id for cube in cubes}
    left = engine.activation.left
    for cube in cubes:
        assert all(cube.id not in context.sources for context in left.of(alice.principal, cube.id, WINDOW))


def test_neutral_contexts_can_be_asked_for(tiny_folder, tmp_path):
    with MemoryEngine.open(
        tiny_folder, tmp_path / "store", memory=MemoryConfig(contexts="neutral"), embedder=HashingEmbedder(64)
    ) as engine:
        alice = engine.user("alice")
        memories(alice, FEWEST)
        assert not any(sources(engine, alice))
        plain = left_contexts(engine.layout)
        assert [c.token_ids for c in engine.activation.left.of(alice.principal, "", WINDOW)] == plain
    with pytest.raises(ConfigError, match="contexts='others'"):
        MemoryConfig(contexts="others")


@pytest.mark.parametrize("end", ["delete", "erase"])
def test_a_record_goes_with_every_memory_that_stood_to_its_left(engine, end):
    alice = engine.user("alice")
    cubes = memories(alice, FEWEST)
    found = sources(engine, alice)
    outside = cubes[0]
    others = [names for names in found if outside.id not in names]
    inside = next(cube for cube in cubes if any(cube.id in names for names in others))
    alice.warm([outside.id])
    assert AVERAGED in stored(engine, alice, outside)
    seen = {row[0] for row in rows(engine, "SELECT DISTINCT source_id FROM kv_context")}
    assert inside.id in seen
    getattr(alice, end)(inside.id)
    assert AVERAGED not in stored(engine, alice, outside)
    alice.warm([outside.id])  # 31 are too few: neutral ones again
    assert AVERAGED in stored(engine, alice, outside)
    assert rows(engine, "SELECT * FROM kv_context") == []


def test_with_four_times_the_memories_records_are_made_anew(engine):
    alice = engine.user("alice")
    first = memories(alice, FEWEST)[0]
    alice.warm([first.id])
    before = stored(engine, alice, first)[AVERAGED][0]
    memories(alice, 3 * FEWEST - 1, FEWEST)
    alice.warm([first.id])
    assert stored(engine, alice, first)[AVERAGED][0] == before
    memories(alice, 1, 4 * FEWEST)
    alice.warm([first.id])
    after = stored(engine, alice, first)[AVERAGED][0]
    assert after != before
    kept = {row[0] for row in rows(engine, f"SELECT identity FROM kv_artifact WHERE cube_id = '{first.id}'")}
    assert after.digest() in kept
    assert before.digest() not in kept


def test_a_record_whose_contexts_stayed_the_same_is_kept(engine, monkeypatch):
    """An owner's choice may change and leave a long memory with neutral contexts, as before."""
    alice = engine.user("alice")
    (cube,) = memories(alice, 1)
    monkeypatch.setattr(engine.activation.left, "former", engine.activation.left.of)
    alice.warm([cube.id])
    assert AVERAGED in stored(engine, alice, cube)
