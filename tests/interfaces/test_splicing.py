"""Stored KV from the user's side: both forms, the share computed again, int8, the canary, the fallbacks."""

from __future__ import annotations

import shutil
import sqlite3

import pytest

from memos_engine import DecoderConfig, MemoryConfig, MemoryEngine, SamplingParams, activation
from memos_engine.activation import ANCHORED, AVERAGED
from memos_engine.canary import LOOKED_AT
from memos_engine.config import ConfigError
from memos_engine.decoder.sequence import KVSpan
from memos_engine.errors import MemoryInputError, MemoryNotFoundError
from memos_engine.memory.embed import HashingEmbedder

SHORT = SamplingParams(max_new_tokens=8, stop_token_ids=(0,))
FACTS = ["My dog is called Biscuit.", "My sister lives in Lisbon.", "I play the cello on Mondays."]
QUESTION = "What is my dog called?"


def open_engine(folder, store, **memory):
    config = MemoryConfig(**{"min_score": -1.0, "distraction": 0.0, **memory})
    return MemoryEngine.open(
        folder, store, decoder=DecoderConfig(dtype="float32"), memory=config, embedder=HashingEmbedder(64)
    )


@pytest.fixture
def started(tiny_folder, tmp_path):
    """started(**MemoryConfig fields) -> (engine, alice), whose memories are stored and encoded."""
    engines = []

    def start(**memory):
        engine = open_engine(tiny_folder, tmp_path / "store", **memory)
        engines.append(engine)
        alice = engine.user("alice")
        if not alice.memories():
            for fact in FACTS:
                alice.remember(fact)
        alice.warm()
        return engine, alice

    yield start
    for engine in engines:
        engine.decoder.check_integrity()
        engine.close()


def records(engine, alice):
    """The records a request splices, by slot."""
    head, query = engine.layout.anchor, engine.layout.query(QUESTION)
    prepared = engine.prepare(alice.principal, QUESTION, head, query)
    return [span.record for span in prepared.spans if isinstance(span, KVSpan) and span.memory]


def audited(engine):
    path = engine.store.directory / "memory.db"
    with sqlite3.connect(path) as conn:
        return [row[0] for row in conn.execute("SELECT event FROM audit ORDER BY seq")]


def test_the_first_slot_is_exact_and_the_others_are_averages(started):
    engine, alice = started()
    first, *others = records(engine, alice)
    assert first.left
    assert first.sigma_v is None
    assert len(others) == 2
    for record in others:
        assert record.left == ""
        assert record.sigma_v is not None
        assert record.rank is not None


def test_a_memory_knows_its_left_contexts(started):
    """Those that fit the model's window, by digest; another set of them is another identity."""
    engine, alice = started()
    cube = alice.memories()[0]
    ids = engine.layout.memory(cube.body)
    longest = engine.decoder.spec.max_positions
    identities = engine.activation.identities(alice.principal, cube.id, ids)
    assert set(identities) == {ANCHORED, AVERAGED}
    contexts = engine.activation.left.of(alice.principal, cube.id, longest)
    assert 1 <= len(identities[AVERAGED].left_contexts) <= len(contexts)
    too_long = ids * (longest // len(ids))
    assert set(engine.activation.identities(alice.principal, cube.id, too_long)) == {ANCHORED}


@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 1.0])
def test_the_share_goes_from_the_caller_to_the_step(started, share):
    _, alice = started()
    reply = alice.chat(QUESTION, SHORT, recompute=share)
    assert set(reply.forms.values()) == {"kv"}
    assert reply.plan.recompute == share
    memory_tokens = reply.plan.tokens
    spliced = [s.tokens for s in reply.plan.segments]
    expected = min(round(share * memory_tokens), memory_tokens - spliced[0])
    assert reply.stats.recomputed_tokens == (expected if share < 1 else 0)  # all of it is plain prefill
    if share == 1.0:
        text = alice.chat(QUESTION, SHORT, form="text")
        assert reply.token_ids == text.token_ids


def test_the_engine_s_share_is_the_default(started):
    _, alice = started(recompute=0.3)
    assert alice.chat(QUESTION, SHORT).plan.recompute == 0.3
    assert alice.chat(QUESTION, SHORT, recompute=0.0).plan.recompute == 0.0
    with pytest.raises(MemoryInputError, match="between 0 and 1"):
        alice.chat(QUESTION, SHORT, recompute=1.5)


def test_int8_records_are_smaller_and_another_identity(started):
    engine, alice = started()
    plain = {record.nbytes for record in records(engine, alice)}
    wide, alice = started(kv_dtype="int8")
    small = records(wide, alice)
    assert all(record.quantized for record in small)
    assert max(record.nbytes for record in small) < 0.4 * min(plain)
    reply = alice.chat(QUESTION, SHORT)
    assert set(reply.forms.values()) == {"kv"}
    assert (
        alice.chat(QUESTION, SHORT, recompute=1.0).token_ids
        == alice.chat(QUESTION, SHORT, form="text").token_ids
    )


def test_pages_of_int8_are_another_identity(tiny_folder, tmp_path, started):
    """Records keep the model's dtype, and those made over other pages are not found."""
    plain, alice = started()
    decoder = DecoderConfig(dtype="float32", page_dtype="int8")
    with MemoryEngine.open(
        tiny_folder, tmp_path / "store", decoder=decoder, memory=plain.config, embedder=HashingEmbedder(64)
    ) as engine:
        cube = alice.memories()[0]
        ids = engine.layout.memory(cube.body)
        theirs, ours = (e.activation.identities(alice.principal, cube.id, ids) for e in (plain, engine))
        assert {i.dtype for i in theirs.values()} == {"torch.float32"}
        assert all(ours[form].digest() != theirs[form].digest() for form in ours)
        assert engine.activation.model != plain.activation.model
        alice = engine.user("alice")
        assert not records(engine, alice)
        alice.warm()
        made = records(engine, alice)
        assert made
        assert {str(record.k.dtype) for record in made} == {"torch.float32"}
        assert set(alice.chat(QUESTION, SHORT).forms.values()) == {"kv"}
        full = alice.chat(QUESTION, SHORT, recompute=1.0).token_ids
        assert full == alice.chat(QUESTION, SHORT, form="text").token_ids
        engine.decoder.check_integrity()


@pytest.mark.parametrize("form", [ANCHORED, AVERAGED])
def test_one_damaged_form_leaves_the_other(started, form):
    engine, alice = started(build=False)
    cube = next(c for c in alice.memories() if c.body == FACTS[0])
    found = engine.activation.find(alice.principal, cube, engine.layout.memory(FACTS[0]))
    path = engine.store.vault.path(found.records[form][1])
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    engine.activation.evict()
    replies = [alice.chat(question, SHORT) for question in (QUESTION, FACTS[1])]
    assert {form for reply in replies for form in reply.forms.values()} == {"kv"}
    assert any("kv_dropped" in event for event in audited(engine))
    left = engine.activation.find(alice.principal, cube, engine.layout.memory(FACTS[0])).records
    assert set(left) == {ANCHORED, AVERAGED} - {form}


def test_a_lost_form_is_built_again_after_the_reply(started):
    engine, alice = started()
    before = sorted(p.name for p in (engine.store.directory / "vault").rglob("*.safetensors"))
    for cube in alice.memories():
        found = engine.activation.find(alice.principal, cube, engine.layout.memory(cube.body))
        engine.store.vault.path(found.records[AVERAGED][1]).write_bytes(b"")
    engine.activation.evict()
    assert set(alice.chat(QUESTION, SHORT).forms.values()) == {"kv"}
    after = sorted(p.name for p in (engine.store.directory / "vault").rglob("*.safetensors"))
    assert len(after) == len(before)
    assert all(record.left == "" for record in records(engine, alice)[1:])


def test_a_pool_too_small_for_averages_says_so_once(tiny_folder, tmp_path, caplog, monkeypatch):
    """And computes nothing in vain: the first form serves in every slot."""
    decoder = DecoderConfig(dtype="float32", pool_tokens=256)
    config = MemoryConfig(min_score=-1.0, distraction=0.0)
    embedder = HashingEmbedder(64)
    with MemoryEngine.open(
        tiny_folder, tmp_path / "store", decoder=decoder, memory=config, embedder=embedder
    ) as engine:
        alice = engine.user("alice")
        for fact in FACTS[:2]:
            alice.remember(fact)
        alice.warm()
        monkeypatch.setattr(activation, "encode_averaged", None)  # a call would fail
        assert set(alice.chat(QUESTION, SHORT, max_memories=2).forms.values()) == {"kv"}
        assert [record.left == "" for record in records(engine, alice)] == [False, False]
    assert caplog.text.count("too small for averaged records") == 1


def test_a_memory_with_both_forms_damaged_goes_in_as_text(started):
    engine, alice = started(build=False)
    wanted = alice.chat(QUESTION, SHORT, form="text").token_ids
    for path in (engine.store.directory / "vault").rglob("*.safetensors"):
        path.write_bytes(b"")
    engine.activation.evict()
    engine.decoder.forget_prefixes()
    reply = alice.chat(QUESTION, SHORT)
    assert set(reply.forms.values()) == {"text"}
    assert all("refused (size)" in row["reason"] for row in reply.plan.explain())
    assert reply.token_ids == wanted


def test_the_canary_sees_that_full_prefill_is_full_prefill(started):
    engine, alice = started(canary=1.0, recompute=1.0)
    for _ in range(3):
        alice.chat(QUESTION, SHORT)
    assert len(engine.canary.latest) == 3
    assert max(engine.canary.latest) < 1e-6


def test_drift_turns_splicing_off_for_good_and_says_why(started):
    engine, alice = started(canary=1.0, canary_kl=1e-12)
    for _ in range(LOOKED_AT):
        assert set(alice.chat(QUESTION, SHORT).forms.values()) == {"kv"}
    reply = alice.chat(QUESTION, SHORT)
    assert set(reply.forms.values()) == {"text"}
    assert all("splicing is turned off for this model" in row["reason"] for row in reply.plan.explain())
    assert sum("splicing_off" in event for event in audited(engine)) == 1
    again, alice = started()
    assert set(alice.chat(QUESTION, SHORT).forms.values()) == {"text"}
    other, bob = started(kv_dtype="int8")  # another way to store it is another matter
    assert set(bob.chat(QUESTION, SHORT).forms.values()) == {"kv"}
    again.activation.turn(None)
    assert set(alice.chat(QUESTION, SHORT).forms.values()) == {"kv"}
    assert sum("splicing_on" in event for event in audited(other)) == 1


def test_no_canary_without_a_share_or_without_splicing(started):
    engine, alice = started()
    alice.chat(QUESTION, SHORT)
    assert not engine.canary.latest
    engine, alice = started(canary=1.0)
    alice.chat(QUESTION, SHORT, form="text")
    assert not engine.canary.latest


@pytest.mark.parametrize(
    "fields", [{"canary": 2}, {"canary_kl": 0.0}, {"kv_dtype": "int4"}, {"recompute": -1}]
)
def test_impossible_settings(fields):
    with pytest.raises(ConfigError):
        MemoryConfig(**fields)


# -- hostile surroundings ------------------------------------------------------------------------


def test_swapped_files_are_never_used(started):
    """Two records' files under each other's names: both are refused, and the answer is that of text."""
    engine, alice = started(build=False)
    wanted = alice.chat(QUESTION, SHORT, form="text").token_ids
    files = sorted((engine.store.directory / "vault").rglob("*.safetensors"))
    contents = [path.read_bytes() for path in files]
    for path, other in zip(files, [*contents[1:], contents[0]], strict=True):
        path.write_bytes(other)
    engine.activation.evict()
    engine.decoder.forget_prefixes()
    reply = alice.chat(QUESTION, SHORT)
    assert set(reply.forms.values()) == {"text"}
    assert reply.token_ids == wanted


def test_the_store_deleted_under_a_running_engine(started):
    engine, alice = started()
    shutil.rmtree(engine.store.directory)
    engine.activation.evict()
    engine.decoder.forget_prefixes()
    reply = alice.chat(QUESTION, SHORT)
    assert set(reply.forms.values()) == {"text"}
    assert all("refused (missing)" in row["reason"] for row in reply.plan.explain())


def test_no_memories_and_the_same_one_twice(started):
    engine, _ = started()
    bob = engine.user("bob")
    assert bob.chat(QUESTION, SHORT).forms == {}
    bob.remember(FACTS[0])
    bob.remember(FACTS[0])
    bob.warm()
    reply = bob.chat(QUESTION, SHORT, recompute=0.5)
    assert set(reply.forms.values()) == {"kv"}
    text = bob.chat(QUESTION, SHORT, form="text")
    assert bob.chat(QUESTION, SHORT, recompute=1.0).token_ids == text.token_ids


def test_many_tiny_memories(started):
    """As many as the window takes, each with its records; the rest is skipped with a reason."""
    engine, _ = started(max_memories=1000)
    carol = engine.user("carol")
    for number in range(60):
        carol.remember(str(number))
    carol.warm()
    reply = carol.chat(QUESTION, SHORT, recompute=0.1)
    assert set(reply.forms.values()) == {"kv"}
    assert len(reply.forms) >= 10
    assert reply.stats.recomputed_tokens == round(0.1 * reply.plan.tokens)
    skipped = [row for row in reply.plan.explain() if row["form"] == "skip"]
    assert all("tokens" in row["reason"] for row in skipped)


def test_a_memory_longer_than_the_window_is_refused(started):
    _, alice = started()
    with pytest.raises(MemoryInputError, match="Split it"):
        alice.remember("word " * 5000)


def test_another_tenant_s_records_are_not_found(started):
    engine, alice = started()
    cube = alice.memories()[0]
    ids = engine.layout.memory(cube.body)
    mallory = engine.user("mallory").principal
    ours = engine.activation.identities(alice.principal, cube.id, ids)
    theirs = engine.activation.identities(mallory, cube.id, ids)
    assert all(ours[form].digest() != theirs[form].digest() for form in ours)
    with pytest.raises(MemoryNotFoundError):
        engine.activation.find(mallory, cube, ids)
