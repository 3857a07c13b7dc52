"""A time to first token from the user's side: it is kept, explained, and no dead tier is waited for."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace

import pytest
import torch

from memos_engine import DecoderConfig, MemoryConfig, MemoryEngine, SamplingParams, attach, detach, planning
from memos_engine.calibration import calibrate, load_costs, save_costs
from memos_engine.config import ConfigError
from memos_engine.decoder.sequence import TextSpan
from memos_engine.errors import MemoryInputError, PayloadError
from memos_engine.memory.embed import HashingEmbedder
from memos_engine.memory.scheduler import MemScheduler
from tests.memory.test_costs import TABLE

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = SamplingParams(max_new_tokens=6, stop_token_ids=(0,))
FACTS = ["My dog is called Biscuit.", "My sister lives in Lisbon.", "I play the cello on Mondays."]
QUESTION = "What is my dog called?"
AMPLE = 60_000.0


@pytest.fixture
def started(tiny_folder, tmp_path):
    """started(**MemoryConfig fields) -> (engine, alice), whose memories are stored and encoded."""
    engines = []

    def start(**memory):
        config = MemoryConfig(**{"min_score": -1.0, "distraction": 0.0, **memory})
        engine = MemoryEngine.open(
            tiny_folder, tmp_path / "store", decoder=DecoderConfig(dtype="float32"), memory=config,
            embedder=HashingEmbedder(64),
        )  # fmt: skip
        engines.append(engine)
        alice = engine.user("alice")
        if not alice.memories():
            for fact in FACTS:
                alice.remember(fact)
            alice.warm()
        engine.preparer.use(MemScheduler(replace(TABLE, retrieve_ms=0.5, plan_ms=0.5), distraction=0.0))
        return engine, alice

    yield start
    for engine in engines:
        engine.decoder.check_integrity()
        engine.close()


def test_time_enough_gives_the_answer_of_text(started):
    _, alice = started()
    full = alice.chat(QUESTION, SHORT, form="text")
    reply = alice.chat(QUESTION, SHORT, ttft_budget_ms=AMPLE)
    # The first slot's record is exact, so that text would only be slower.
    assert reply.token_ids == full.token_ids
    assert reply.plan.quality == pytest.approx(1.0)
    assert reply.plan.met
    assert list(reply.forms) == list(full.forms)


def test_the_plan_says_what_was_foreseen_and_what_it_took(started):
    _, alice = started()
    reply = alice.chat(QUESTION, SHORT, ttft_budget_ms=AMPLE)
    report = json.loads(json.dumps(reply.plan.report()))
    assert report["budget_ms"] == AMPLE
    assert report["met"] is True
    assert report["calibrated"] is True
    assert report["actual_ms"] == pytest.approx(reply.ttft_ms, abs=0.01)
    for stage in ("retrieve", "plan", "fetch", "splice", "forward", "queue", "probe"):
        assert set(report["stages"][stage]) == {"predicted_ms", "actual_ms"}
    assert {row["cube_id"] for row in report["memories"]} == {cube.id for cube in alice.memories()}
    assert report["rejected"]


def test_a_budget_in_the_settings_counts_for_every_chat(started):
    _, alice = started(ttft_budget_ms=AMPLE)
    assert alice.chat(QUESTION, SHORT).plan.budget_ms == AMPLE
    assert alice.chat(QUESTION, SHORT, ttft_budget_ms=2 * AMPLE).plan.budget_ms == 2 * AMPLE


@pytest.mark.parametrize("bad", [0, -1, float("nan"), float("inf")])
def test_what_is_no_budget_is_refused(started, bad):
    _, alice = started()
    with pytest.raises(MemoryInputError, match="ttft_budget_ms"):
        alice.chat(QUESTION, SHORT, ttft_budget_ms=bad)
    with pytest.raises(ConfigError, match="ttft_budget_ms"):
        MemoryConfig(ttft_budget_ms=bad)


def test_too_little_time_still_gives_an_answer_and_says_so(started):
    _, alice = started()
    bare = alice.chat(QUESTION, SHORT, form="none")
    reply = alice.chat(QUESTION, SHORT, ttft_budget_ms=0.01)
    assert reply.token_ids == bare.token_ids
    assert not reply.plan.feasible
    assert reply.plan.met is False
    assert any("bare query cannot meet" in note for note in reply.plan.notes)
    assert any("none were looked for" in note for note in reply.plan.notes)


def test_a_stalled_tier_is_not_waited_for(started, monkeypatch):
    engine, alice = started()
    engine.activation.evict()
    held = threading.Event()
    read = engine.store.vault.read
    monkeypatch.setattr(engine.store.vault, "read", lambda *a, **k: held.wait(30) and read(*a, **k))
    reply = alice.chat(QUESTION, SHORT, form="kv", ttft_budget_ms=300.0)
    assert "kv" not in reply.forms.values()
    assert any("not read in time" in note for note in reply.plan.notes)
    reasons = [row["reason"] for row in reply.plan.explain()]
    assert all("not read in time" in reason for reason in reasons)
    held.set()  # what came late is at hand the next time
    for _ in range(200):
        if engine.activation.tiers.host.records:
            break
        time.sleep(0.01)
    assert engine.activation.tiers.host.records


def test_what_ends_while_it_is_read_stays_nowhere(started, monkeypatch):
    engine, alice = started()
    engine.activation.evict()
    held = threading.Event()
    read = engine.store.vault.read
    monkeypatch.setattr(engine.store.vault, "read", lambda *a, **k: held.wait(30) and read(*a, **k))
    alice.chat(QUESTION, SHORT, form="kv", ttft_budget_ms=100.0)
    readers = [thread for thread in threading.enumerate() if thread.name == "memos-engine-fetch"]
    engine.config = replace(engine.config, build=False)
    engine.activation.evict()  # as after an erasure
    held.set()
    for reader in readers:
        reader.join(5)
    assert not engine.activation.tiers.host.records


def test_stalled_reads_do_not_gather_threads(started, monkeypatch):
    engine, alice = started()
    held = threading.Event()
    monkeypatch.setattr(engine.store.vault, "read", lambda *a, **k: held.wait(30) and None)
    for _ in range(planning.READERS + 3):
        engine.activation.evict()
        reply = alice.chat(QUESTION, SHORT, form="kv", ttft_budget_ms=60.0)
        assert "kv" not in reply.forms.values()
    readers = [thread for thread in threading.enumerate() if thread.name == "memos-engine-fetch"]
    assert len(readers) <= planning.READERS
    held.set()
    for reader in readers:
        reader.join(5)


@pytest.mark.parametrize("budget", [None, AMPLE])
def test_a_tier_that_dies_gives_text(started, monkeypatch, budget):
    engine, alice = started()
    full = alice.chat(QUESTION, SHORT, form="text")
    engine.activation.evict()

    def gone(*_args, **_more):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(engine.store.vault, "read", gone)
    reply = alice.chat(QUESTION, SHORT, form="kv", ttft_budget_ms=budget)
    assert reply.token_ids == full.token_ids
    assert set(reply.forms.values()) == {"text"}
    assert all("could not be read" in segment.reason for segment in reply.plan.segments)


def test_a_damaged_record_is_dropped_under_a_budget_too(started, monkeypatch):
    engine, alice = started()
    engine.activation.evict()

    def damaged(*_args, **_more):
        raise PayloadError("the bytes changed", "checksum")

    with monkeypatch.context() as patch:
        patch.setattr(engine.store.vault, "read", damaged)
        reply = alice.chat(QUESTION, SHORT, form="kv", ttft_budget_ms=AMPLE)
    assert set(reply.forms.values()) == {"text"}
    assert all("refused (checksum)" in segment.reason for segment in reply.plan.segments)
    again = alice.chat(QUESTION, SHORT, form="kv", ttft_budget_ms=AMPLE)  # built anew after the first reply
    assert set(again.forms.values()) == {"kv"}


@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_a_clock_that_jumps_harms_nothing(started, jump):
    engine, alice = started()
    ticks = iter(range(10**9))
    engine.preparer.clock = lambda: time.perf_counter() + jump * (next(ticks) % 2)
    for _ in range(5):
        reply = alice.chat(QUESTION, SHORT, ttft_budget_ms=AMPLE)
        assert reply.token_ids
    factors = engine.preparer.scheduler.residuals.factors()
    assert all(1 / 8 <= factor <= 8 for factor in factors.values())


def test_memories_kept_out_by_time_are_built_for_the_next(tiny_folder, tmp_path):
    config = MemoryConfig(min_score=-1.0, distraction=0.0)
    with MemoryEngine.open(
        tiny_folder, tmp_path / "store", decoder=DecoderConfig(dtype="float32"), memory=config,
        embedder=HashingEmbedder(64),
    ) as engine:  # fmt: skip
        alice = engine.user("alice")
        cube = alice.remember(FACTS[0])
        rows = len(engine.layout.anchor) + len(engine.layout.query(QUESTION))
        slow = replace(TABLE, forward=((1, 1e3), (1024, 1024e3)), pairs_ms=0.0, retrieve_ms=0.1, plan_ms=0.1)
        engine.preparer.use(MemScheduler(slow, distraction=0.0))
        reply = alice.chat(QUESTION, SHORT, ttft_budget_ms=(rows + 10) * 1.21e3)
        assert not reply.forms
        assert "no KV stored yet" in reply.plan.skipped[0].reason
        assert engine.store.kv_identities(alice.principal, cube.id)


def test_text_that_was_computed_before_is_found_in_pages(started):
    engine, alice = started()
    for _ in range(2):
        reply = alice.chat(QUESTION, SHORT, form="text", ttft_budget_ms=AMPLE)
    assert any("in pages" in segment.reason for segment in reply.plan.segments)
    assert reply.stats.prefix_tokens > len(engine.layout.anchor)


def test_an_attached_model_keeps_a_budget(tiny_folder, tokenizer, load, tmp_path, ids_of):
    with MemoryEngine.open(tiny_folder, tmp_path / "store", embedder=HashingEmbedder(64)) as engine:
        engine.user("alice").remember(FACTS[0])
    model = attach(
        load(), tokenizer, tmp_path / "store", user="alice", embedder=HashingEmbedder(64),
        memory=MemoryConfig(min_score=-1.0, distraction=0.0),
    )  # fmt: skip
    try:
        ids = ids_of()
        free = model.generate(ids, max_new_tokens=4, do_sample=False, ttft_budget_ms=AMPLE)
        tight = model.generate(ids, max_new_tokens=4, do_sample=False, ttft_budget_ms=0.01)
        plain = model.generate(ids, max_new_tokens=4, do_sample=False, memory_form="none")
        assert free.shape == tight.shape == plain.shape
        assert tight.tolist() == plain.tolist()
        with pytest.raises(MemoryInputError, match="ttft_budget_ms"):
            model.generate(ids, max_new_tokens=4, ttft_budget_ms=-1, memory_query="dog")
    finally:
        detach(model)


# -- calibration ---------------------------------------------------------------------------------------


def test_a_calibrated_machine_is_known_again(started, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("MEMOS_ENGINE_CACHE", str(tmp_path / "cache"))
    engine, _ = started()
    decoder = engine.decoder
    assert not load_costs(decoder).calibrated
    table = calibrate(decoder, HashingEmbedder(64))
    path = save_costs(table)
    assert load_costs(decoder) == table
    decoder.check_integrity()
    path.write_text(replace(table, key="another machine").to_json())
    assert not load_costs(decoder).calibrated
    assert "another machine" in caplog.text
    path.write_text("{")
    assert not load_costs(decoder).calibrated
    assert "calibrate" in caplog.text


def test_another_thread_count_is_another_machine(started, monkeypatch, tmp_path):
    monkeypatch.setenv("MEMOS_ENGINE_CACHE", str(tmp_path / "cache"))
    engine, _ = started()
    save_costs(calibrate(engine.decoder))
    assert load_costs(engine.decoder).calibrated
    torch.set_num_threads(torch.get_num_threads() + 1)
    try:
        assert not load_costs(engine.decoder).calibrated
    finally:
        torch.set_num_threads(torch.get_num_threads() - 1)


def test_a_busy_engine_is_not_calibrated(started):
    engine, _ = started()
    request = engine.decoder.add_request([TextSpan((5, 6, 7))], SamplingParams(max_new_tokens=2))
    with pytest.raises(MemoryInputError, match="idle"):
        calibrate(engine.decoder)
    engine.decoder.abort(request)
