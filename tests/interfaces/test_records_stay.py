"""Requests read KV records and never write them: on disk, in the database and in host memory."""

from __future__ import annotations

import hashlib
import random
import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest

from memos_engine import DecoderConfig, MemoryConfig, MemoryEngine, SamplingParams
from memos_engine.memory.embed import HashingEmbedder

FACTS = [
    "My dog is called Biscuit and sleeps under the stairs.",
    "My sister lives in Lisbon, near the river.",
    "I play the cello on Mondays with two neighbours.",
    "The key of the cellar hangs behind the kitchen door.",
    "In winter I take the train to work, in summer the bicycle.",
    "Our garden has two plum trees and a pond.",
]
GENERATIONS, AT_ONCE = 60, 12


@pytest.fixture(params=["auto", "int8"])
def engine(request, tiny_folder, tmp_path, one_thread):
    """Six memories with their records, half of which host memory holds."""
    with MemoryEngine.open(
        tiny_folder,
        tmp_path / "store",
        decoder=DecoderConfig(dtype="float32", pool_tokens=4096),
        memory=MemoryConfig(min_score=-1.0, distraction=0.0, max_memories=3, kv_dtype=request.param),
        embedder=HashingEmbedder(64),
    ) as engine:
        alice = engine.user("alice")
        for fact in FACTS:
            alice.remember(fact)
        assert alice.warm() == len(FACTS)
        record = next(iter(loaded(engine, alice)))
        engine.activation.tiers.host.most = len(FACTS) * record.nbytes
        engine.activation.evict()
        yield engine
        engine.decoder.check_integrity()


def loaded(engine, person):
    """Every record, by way of host memory."""
    for cube in person.memories():
        stored = engine.activation.find(person.principal, cube, engine.layout.memory(cube.body))
        for form in stored.records:
            yield engine.activation.load(stored, form)


def on_disk(engine):
    directory = engine.store.directory
    files = sorted(path for path in (directory / "vault").rglob("*") if path.is_file())
    with sqlite3.connect(directory / "memory.db") as db:
        rows = db.execute("SELECT * FROM kv_artifact ORDER BY identity, cube_id").fetchall()
    db.close()
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}, rows


def digests(record):
    """SHA-256 of the record's tensors as they are in memory."""
    return {n: hashlib.sha256(t.numpy().tobytes()).hexdigest() for n, t in record.tensors().items()}


@pytest.mark.parametrize("recompute", [0.0, 0.3])
def test_concurrent_generations_leave_every_record_as_it_was(engine, recompute):
    alice, draw = engine.user("alice"), random.Random(0)
    questions = [f"{i}: " + " ".join(draw.sample(draw.choice(FACTS).split(), 4)) for i in range(GENERATIONS)]
    params = SamplingParams(max_new_tokens=6)

    def ask(question):
        return alice.chat(question, params, form="kv", recompute=recompute)

    first = ask(questions[0])
    before, anchor = on_disk(engine), digests(engine.activation.anchor().record)
    assert len(before[0]) == len(before[1]) == 2 * len(FACTS)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        replies = list(pool.map(ask, questions))
    assert all(set(reply.forms.values()) == {"kv"} for reply in replies)
    assert all(bool(reply.stats.recomputed_tokens) == bool(recompute) for reply in replies)
    assert len({tuple(reply.forms) for reply in replies}) > 10  # orders
    assert on_disk(engine) == before
    kept = list(engine.activation.tiers.host.records.values())
    assert 0 < len(kept) < 2 * len(FACTS)
    for record in (*kept, *loaded(engine, alice)):
        assert digests(record) == {n: record.header["checksums"][n]["sha256"] for n in record.tensors()}
    assert digests(engine.activation.anchor().record) == anchor
    engine.decoder.forget_prefixes()
    assert ask(questions[0]).token_ids == first.token_ids
