"""The way of a request through store, plan and decoder: any doubt about stored KV ends in the text form."""

from __future__ import annotations

import sqlite3

import pytest

from memos_engine import DecoderConfig, MemoryConfig, MemoryEngine, SamplingParams
from memos_engine.errors import (
    ContextLengthError,
    MemoryInputError,
    MemoryNotFoundError,
    ModelError,
    ModelFilesError,
    PayloadError,
    StoreError,
)
from memos_engine.memory.embed import HashingEmbedder

SHORT = SamplingParams(max_new_tokens=12, stop_token_ids=(0,))
FACTS = ["My dog is called Biscuit.", "My sister lives in Lisbon.", "I play the cello on Mondays."]


def open_engine(folder, store, dtype="float32", **memory):
    config = MemoryConfig(**{"min_score": -1.0, "distraction": 0.0, **memory})
    return MemoryEngine.open(
        folder, store, decoder=DecoderConfig(dtype=dtype), memory=config, embedder=HashingEmbedder(64)
    )


@pytest.fixture
def engine(tiny_folder, tmp_path):
    with open_engine(tiny_folder, tmp_path / "store") as engine:
        yield engine
        engine.decoder.check_integrity()
        assert not engine.decoder.batcher.running


@pytest.fixture
def alice(engine):
    person = engine.user("alice")
    for fact in FACTS:
        person.remember(fact)
    return person


def kv_files(engine):
    return sorted(p for p in (engine.store.directory / "vault").rglob("*") if p.is_file())


def test_first_as_text_then_spliced(alice, engine):
    first = alice.chat("What is my dog called?", SHORT)
    assert set(first.forms.values()) == {"text"}
    assert all("no KV" in row["reason"] for row in first.plan.explain())
    second = alice.chat("What is my dog called?", SHORT)
    assert set(second.forms.values()) == {"kv"}
    assert second.stats.spliced_tokens > 0
    assert len(kv_files(engine)) == 6  # two forms of each


def test_one_memory_spliced_gives_the_tokens_of_its_text(engine):
    person = engine.user("alice")
    person.remember(FACTS[0])
    text = person.chat("What is my dog called?", SHORT, form="text")
    engine.decoder.forget_prefixes()
    person.warm()
    spliced = person.chat("What is my dog called?", SHORT, form="kv")
    assert spliced.forms == dict.fromkeys(text.forms, "kv")
    assert spliced.token_ids == text.token_ids


def test_records_outlive_the_process(tiny_folder, tmp_path, alice, engine):
    alice.warm()
    engine.close()
    with open_engine(tiny_folder, tmp_path / "store") as again:
        reply = again.user("alice").chat("dog", SHORT)
        assert set(reply.forms.values()) == {"kv"}


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "swap", "remove"])
def test_a_damaged_record_goes_in_as_text_and_is_rebuilt(alice, engine, damage):
    alice.warm()
    truth = alice.chat("dog", SHORT, form="text").token_ids
    files = kv_files(engine)
    engine.activation.evict()
    engine.decoder.forget_prefixes()
    contents = [f.read_bytes() for f in files]
    for i, file in enumerate(files):
        file.chmod(0o600)
        data = bytearray(contents[i])
        if damage == "flip":
            data[len(data) // 2] ^= 1
        elif damage == "truncate":
            data = data[: len(data) // 2]
        elif damage == "empty":
            data = bytearray()
        elif damage == "swap":
            data = bytearray(contents[(i + 1) % len(files)])
        file.unlink() if damage == "remove" else file.write_bytes(data)
    reply = alice.chat("dog", SHORT)
    assert set(reply.forms.values()) == {"text"}
    assert all("refused" in row["reason"] for row in reply.plan.explain())
    assert reply.token_ids == truth
    assert set(alice.chat("dog", SHORT).forms.values()) == {"kv"}, "rebuilt after the reply"


def test_another_dtype_or_model_is_a_miss_with_its_reason(tiny_folder, tmp_path, alice, engine):
    alice.warm()
    engine.close()
    with open_engine(tiny_folder, tmp_path / "store", dtype="bfloat16", build=False) as other:
        reply = other.user("alice").chat("dog", SHORT)
        assert set(reply.forms.values()) == {"text"}
        assert all("another model, dtype" in row["reason"] for row in reply.plan.explain())


def test_users_never_meet(alice, engine):
    bob = engine.user("bob")
    bob.remember("My dog is called Rex.")
    alice.warm()
    bob.warm()
    reply = bob.chat("What is my dog called?", SHORT)
    assert set(reply.forms) == {c.id for c in bob.memories()}
    theirs = alice.memories()[0].id
    for act in (bob.archive, bob.delete, bob.erase, bob.history):
        with pytest.raises(MemoryNotFoundError):
            act(theirs)
    with pytest.raises(MemoryNotFoundError):
        bob.warm([theirs])
    assert engine.user("carol").chat("dog", SHORT).forms == {}


def test_equal_texts_of_two_users_do_not_share_fate(engine):
    alice, bob = engine.user("alice"), engine.user("bob")
    mine, theirs = alice.remember(FACTS[0]), bob.remember(FACTS[0])
    alice.warm()
    bob.warm()
    alice.erase(mine.id)
    assert bob.chat("dog", SHORT).forms == {theirs.id: "kv"}


def test_archive_delete_erase(alice, engine):
    first, second, third = alice.memories()
    alice.warm()
    alice.archive(first.id)
    assert first.id not in {c.cube.id for c in alice.recall("dog")}
    alice.restore(first.id)
    assert first.id in {c.cube.id for c in alice.recall("dog")}
    alice.delete(second.id)
    alice.erase(third.id)
    assert set(alice.chat("anything", SHORT).forms) == {first.id}
    assert len(kv_files(engine)) == 2
    assert [e.event for e in alice.history(second.id)][-1] == "deleted"
    assert all(e.text is None for e in alice.history(third.id))


def test_the_answer_streams(alice):
    pieces = []
    reply = alice.chat("dog", SamplingParams(max_new_tokens=40), stream=pieces.append)
    assert "".join(pieces).strip() == reply.text
    assert reply.ttft_ms <= reply.total_ms


def test_a_live_models_changed_weights_reach_chat_and_records(tiny_folder, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    tokenizer, hashing = AutoTokenizer.from_pretrained(tiny_folder), HashingEmbedder(64)
    with MemoryEngine.from_model(model, tokenizer, tmp_path / "live", embedder=hashing) as engine:
        person = engine.user("alice")
        person.remember(FACTS[0])
        before = person.chat("dog", SHORT, form="none").token_ids
        assert person.warm() == 1
        model.model.layers[0].self_attn.v_proj.weight.data.mul_(-1.5)
        assert person.chat("dog", SHORT, form="none").token_ids != before
        assert person.warm() == 1, "the old record belongs to other weights"
    with MemoryEngine.from_model(model, tokenizer, tmp_path / "live", embedder=hashing) as engine:
        assert engine.user("alice").warm() == 0


def test_a_reply_survives_a_store_that_fails_afterwards(alice, engine, monkeypatch):
    def locked(*_):
        raise StoreError("locked")

    monkeypatch.setattr(engine.store, "record_use", locked)
    monkeypatch.setattr(engine.store, "put_kv", locked)
    assert alice.chat("dog", SHORT).text is not None


def test_the_reason_tells_exact_from_approximate(alice):
    alice.warm()
    assert "exact" in alice.chat("dog", SHORT).plan.explain()[0]["reason"]
    with_history = alice.chat("dog", SHORT, history=[("Hi", "Hello")])
    assert "exact" not in with_history.plan.explain()[0]["reason"]


def test_ready_changes_nothing_but_the_wait(alice, engine):
    expected = alice.chat("dog", SHORT, form="text").token_ids
    assert engine.ready() is engine
    assert alice.chat("dog", SHORT, form="text").token_ids == expected


def test_history_goes_in_front(alice):
    reply = alice.chat("And now?", SHORT, history=[("Hello", "Hi"), ("What?", "Nothing")])
    plain = alice.chat("And now?", SHORT)
    total = reply.stats.prefix_tokens + reply.stats.computed_tokens + reply.stats.spliced_tokens
    assert total > plain.stats.prefix_tokens + plain.stats.computed_tokens + plain.stats.spliced_tokens


def test_a_model_that_gives_nan_stores_nothing(tiny_folder, tmp_path):
    with open_engine(tiny_folder, tmp_path / "nan") as engine:
        person = engine.user("alice")
        person.remember(FACTS[0])
        engine.decoder.runner.model.weights.layers[1].v[:] = float("nan")
        with pytest.raises(PayloadError, match="NaN"):
            person.warm()
        with pytest.raises(ModelError, match="finite"):
            person.chat("dog", SHORT)
        assert kv_files(engine) == []
        engine.decoder.check_integrity()


@pytest.mark.parametrize("text", ["", "   ", "\n\t", "a\x00b", 7, None])
def test_bad_memories_are_refused(alice, text):
    before = len(alice.memories())
    with pytest.raises(MemoryInputError):
        alice.remember(text)
    with pytest.raises(MemoryInputError):
        alice.chat(text)
    assert len(alice.memories()) == before


def test_an_over_long_memory_is_refused_and_nothing_is_stored(alice):
    with pytest.raises(MemoryInputError, match="at most 512"):
        alice.remember("word " * 300)
    assert len(alice.memories()) == 3


def test_a_question_over_the_window_is_refused(alice):
    with pytest.raises(ContextLengthError, match="tokens"):
        alice.chat("why " * 400, SHORT)


def test_memories_that_do_not_fit_are_skipped_with_the_reason(tiny_folder, tmp_path):
    with open_engine(tiny_folder, tmp_path / "s") as engine:
        person = engine.user("alice")
        for i in range(4):
            person.remember(f"fact {i} " + "and so on " * 40)
        reply = person.chat("why " * 30, SHORT)
        skipped = [row for row in reply.plan.explain() if row["form"] == "skip"]
        assert skipped
        assert all("tokens" in row["reason"] for row in skipped)


def test_without_a_store(tiny_folder):
    with MemoryEngine.open(tiny_folder) as engine:
        assert engine.user("alice").chat("Hello", SHORT).forms == {}
        with pytest.raises(StoreError, match="store="):
            engine.user("alice").remember("x")


def test_forms_on_demand(alice):
    alice.warm()
    for form, expected in (("kv", {"kv"}), ("text", {"text"}), ("none", set()), ("auto", {"kv"})):
        assert set(alice.chat("dog", SHORT, form=form).forms.values()) == expected


def test_a_missing_or_half_written_model(tiny_folder, tmp_path):
    with pytest.raises(ModelFilesError, match="pull"):
        MemoryEngine.open("nobody/has-this-model")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_folder.iterdir():
        data = file.read_bytes()
        (broken / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    with pytest.raises(ModelFilesError, match=r"model\.safetensors"):
        MemoryEngine.open(broken, tmp_path / "store")


def test_a_failed_open_closes_the_store(tiny_folder, tmp_path):
    store = tmp_path / "store"
    with pytest.raises(ModelFilesError):
        MemoryEngine.open("nobody/has-this-model", store)
    with open_engine(tiny_folder, store) as engine:
        engine.user("alice").remember("x")


def test_a_locked_store_says_so(tiny_folder, tmp_path, monkeypatch):
    from memos_engine.errors import StoreLockedError
    from memos_engine.memory import store as module

    with open_engine(tiny_folder, tmp_path / "store") as engine:
        engine.user("alice").remember("x")
        other = sqlite3.connect(tmp_path / "store" / "memory.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        opened = module.MemoryStore.open(tmp_path / "store", busy_timeout_ms=50)
        engine.store, old = opened, engine.store
        with pytest.raises(StoreLockedError):
            engine.user("alice").remember("y")
        other.execute("ROLLBACK")
        engine.user("alice").remember("y")
        opened.close()
        engine.store = old
        assert len(engine.user("alice").memories()) == 2


# -- sessions ------------------------------------------------------------------------------------


def test_a_session_holds_its_turns_and_memories(alice, engine):
    alice.warm()
    first = alice.chat("What is my dog called?", SHORT, session="s", max_memories=1)
    pages = engine.chats.get(alice.principal, "s", b"").pages
    before = pages.tokens
    second = alice.chat("And my sister?", SHORT, session="s", max_memories=3)
    assert second.stats.prefix_tokens >= before - 1  # all but the newest token was in its pages
    assert not set(first.forms) & set(second.forms)  # what it holds is not put in again
    whole = [t for span in pages.spans for t in span.token_ids]
    close = list(engine.layout.answer_close)
    at = len(whole) - pages.tokens + before
    assert whole[at - 1 : at - 1 + len(close)] == close or whole[at : at + len(close)] == close


def test_a_replayed_session_answers_the_same(tiny_folder, tmp_path):
    replies = []
    for forget in (False, True):
        with open_engine(tiny_folder, tmp_path / f"store{forget}") as engine:
            bob = engine.user("bob")
            for fact in FACTS:
                bob.remember(fact)
            bob.warm()
            bob.chat("What is my dog called?", SHORT, session="s")
            if forget:
                engine.decoder.forget_prefixes()
            replies.append(bob.chat("Are you sure?", SHORT, session="s"))
            engine.decoder.check_integrity()
    assert replies[0].token_ids == replies[1].token_ids
    assert replies[0].stats.prefix_tokens > 0 == replies[1].stats.prefix_tokens


def test_sessions_of_two_users_are_apart_and_end_with_a_memory(alice, engine):
    bob = engine.user("bob")
    alice.chat("Hello", SHORT, session="s")
    bob.chat("Hello", SHORT, session="s")
    assert engine.chats.get(alice.principal, "s", b"") is not engine.chats.get(bob.principal, "s", b"")
    with pytest.raises(MemoryInputError, match="history"):
        alice.chat("Hello", SHORT, session="s", history=[("a", "b")])
    alice.erase(alice.memories()[0].id)  # the conversation may hold it
    assert not alice.end_session("s")
    assert bob.end_session("s")
    assert engine.decoder.batcher.sessions == {}


def test_a_session_over_the_window_says_so(alice):
    def talk_on():
        for _ in range(200):
            alice.chat("word " * 20, SHORT, session="s", form="none")

    with pytest.raises(ContextLengthError, match="another session"):
        talk_on()
