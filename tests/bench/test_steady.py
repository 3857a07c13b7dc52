"""Steady state on a tiny model: novel orders throughout, rows and ratios, and what happens to records."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from memos_engine.bench import compare, report, steady, suite
from memos_engine.bench.options import Options
from memos_engine.bench.report import tables
from memos_engine.bench.steady_store import Chosen, difference, fingerprints, memory_texts
from memos_engine.bench.steady_traffic import Bed

from memos_engine import DecoderConfig, MemoryEngine, SamplingParams
from memos_engine.config import ConfigError
from memos_engine.interfaces import cli_bench
from memos_engine.memory.embed import Embedder, HashingEmbedder
from memos_engine.prompt import PromptLayout, load_tokenizer


def tiny(tiny_folder: Path, **more: object) -> Options:
    return Options(**{"model": str(tiny_folder), "dtype": "float32", "threads": 1, "n": 10, **more})


@pytest.fixture(scope="module")
def run(tiny_folder):
    """A run's document, and what its requests were: (question, ids of its memories)."""
    asked: list[tuple[str, tuple[str, ...]]] = []
    own = Bed.next

    def next_(bed: Bed) -> tuple[str, tuple[str, ...]]:
        asked.append(own(bed))
        return asked[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bed, "next", next_)
        return steady.run(tiny(tiny_folder, n=20)), asked


def test_rows_from_the_first_requests_to_the_last(run):
    *rows, last = run[0]["rows"]
    assert [row["part"] for row in rows] == ["1 to 4", "5 to 8", "9 to 12", "13 to 16", "17 to 20"]
    assert last["part"] == "40 answers, 32 at once"
    for row in rows:
        assert row["n"] == len(row["samples"]) == 4
        assert 0 < row["ttft_ms_p50"] <= row["ttft_ms_p95"]
        assert row["splice_ms_p50"] > 0
    for row in (*rows, last):
        assert (row["stored"], row["memories"], row["recompute"]) == (8, 4, 0.0)
        assert row["kv_share"] == 1.0
        assert 0 < row["host_share"] < 1  # host memory holds half of the records
        assert row["records"] == 16  # two forms of each
        assert row["rss_mb"] > 0
    assert len({row["vault_mb"] for row in (*rows, last)}) == 1
    assert [last[f"records_{what}"] for what in ("changed", "added", "written")] == [0, 0, 0]
    assert run[0]["notes"] == list(steady.NOTES)


def test_the_last_requests_are_held_against_the_first(run):
    first, last = run[0]["rows"][0]["samples"], run[0]["rows"][-2]["samples"]
    ttft, splice = run[0]["ratios"]
    assert ttft["name"] == "time to first token, last 4 / first 4 requests"
    assert ttft["low"] <= ttft["value"] <= ttft["high"]
    assert ttft["value"] == pytest.approx(sum(sorted(last)[1:3]) / sum(sorted(first)[1:3]), rel=1e-3)
    assert splice["name"].startswith("splice, last 4")


def test_no_order_and_no_question_comes_twice(run):
    asked = run[1]
    assert len(asked) == 2 + 20 + 40  # warm-up, requests, answers at once
    assert len({question for question, _ in asked}) == len(asked)
    assert len({ids for _, ids in asked}) == len(asked)
    assert all(len(set(ids)) == 4 for _, ids in asked)
    assert len({i for _, ids in asked for i in ids}) == 8


def test_hundreds_are_compared_where_there_are_hundreds():
    assert steady._parts(500) == [(i, i + 100) for i in range(0, 500, 100)]
    assert [len(steady._parts(n)) for n in (2, 50, 499, 1000, 1234)] == [2, 5, 5, 10, 12]
    assert steady._parts(1234)[-1][1] == 1234


def test_the_report_and_the_terminal_show_it(run):
    page, _ = report.build([run[0]])
    assert "Steady state" in page
    assert "Records that stay" in page
    assert "records from host memory" in page
    shown = tables.listing(cli_bench._narrow(run[0]))
    assert [c.text for c in shown.head][:2] == ["requests", "recompute"]
    assert "steady" in suite.BENCHES
    compared = compare.compare(run[0], run[0])
    assert compared["regressions"] == 0
    worse = json.loads(json.dumps(run[0]))
    worse["rows"][-1]["records_changed"] = 1
    found = [r for r in compare.compare(run[0], worse)["rows"] if r["metric"] == "records_changed"]
    assert [(r["a"], r["b"], r["verdict"]) for r in found] == [(0.0, 1.0, "unclear")]  # seen, if not judged


# -- what may not happen -------------------------------------------------------------------------


def flip(path: Path) -> None:
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_record_altered_in_between_is_reported(tiny_folder, monkeypatch):
    own = steady.generations

    def generations(bed: Bed, share: float, count: int) -> tuple[list[str], int]:
        made = own(bed, share, count)
        flip(next(bed.vault.directory.rglob("*.safetensors")))
        return made

    monkeypatch.setattr(steady, "generations", generations)
    document = steady.run(tiny(tiny_folder))
    last = document["rows"][-1]
    assert (last["records_changed"], last["records_added"], last["records_written"]) == (1, 0, 0)
    assert any("changed or lost while requests ran: 1" in note for note in document["notes"])


def test_records_that_go_in_as_text_and_are_built_anew_are_reported(tiny_folder, monkeypatch):
    own, calls = steady.one_by_one, []

    def one_by_one(bed: Bed, share: float, count: int) -> list[object]:
        calls.append(count)
        if len(calls) == 3:  # behind the warm-up and the first part
            bed.engine.activation.evict()
            for path in bed.vault.directory.rglob("*.safetensors"):
                flip(path)
        return own(bed, share, count)

    monkeypatch.setattr(steady, "one_by_one", one_by_one)
    document = steady.run(tiny(tiny_folder))
    shares = [row["kv_share"] for row in document["rows"]]
    assert shares[0] == 1.0
    assert shares[1] < 1.0
    assert document["rows"][-1]["records_written"] > 0
    assert any("not every memory entered as KV" in note for note in document["notes"])


def test_fingerprints_tell_changed_lost_and_added_records(tiny_folder, tmp_path):
    with MemoryEngine.open(
        tiny_folder,
        tmp_path / "store",
        decoder=DecoderConfig(dtype="float32"),
        embedder=HashingEmbedder(64),
    ) as engine:
        person = engine.user("alice")
        first = person.remember("My dog is called Biscuit.")
        person.remember("I play the cello on Mondays.")
        person.warm()
        before = fingerprints(engine, person)
        assert len(before) == 4
        person.chat("What is my dog called?", SamplingParams(max_new_tokens=2))
        assert difference(before, fingerprints(engine, person)) == {"records_changed": 0, "records_added": 0}
        (engine.store.vault.directory / "stray").write_bytes(b"x")
        assert difference(before, fingerprints(engine, person)) == {"records_changed": 0, "records_added": 1}
        identity = engine.store.kv_identities(person.principal, first.id)[0]
        blob = engine.store.find_kv(person.principal, first.id, identity)
        engine.store.vault.path(blob).unlink()
        assert difference(before, fingerprints(engine, person)) == {"records_changed": 1, "records_added": 1}
        engine.store.drop_kv(identity, "a test")
        assert difference(before, fingerprints(engine, person)) == {"records_changed": 1, "records_added": 1}


# -- what it stands on ---------------------------------------------------------------------------


def test_memories_are_as_long_as_they_should_be_and_differ(tiny_folder):
    layout = PromptLayout(load_tokenizer(tiny_folder))
    texts = memory_texts(layout, 40, 3)
    assert texts == memory_texts(layout, 40, 3)
    assert len(set(texts)) == 40
    assert all(50 <= len(layout.memory(text)) <= 130 for text in texts)


def test_retrieval_finds_what_was_chosen_in_its_order(tiny_folder, tmp_path):
    chosen = Chosen(6)
    assert isinstance(chosen, Embedder)
    texts = [f"Memory {i}." for i in range(6)]
    for i, text in enumerate(texts):
        chosen.lean(text, (i,))
    chosen.lean("Which?", (4, 0, 5))
    with MemoryEngine.open(
        tiny_folder, tmp_path / "store", decoder=DecoderConfig(dtype="float32"), embedder=chosen
    ) as engine:
        person = engine.user("alice")
        for text in texts:
            person.remember(text)
        found = person.recall("Which?", k=3)
    assert [c.cube.body for c in found] == [texts[4], texts[0], texts[5]]


def test_shares_are_units_of_their_own_and_nothing_is_left_behind(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MEMOS_ENGINE_KEYS", "elsewhere")
    options = tiny(tiny_folder, recompute=(0.0, 0.3), out=tmp_path)
    document = steady.run(options)
    assert document["units"] == ["r = 0", "r = 0.3"]
    assert [row["recompute"] for row in document["rows"]] == 6 * [0.0] + 6 * [0.3]
    assert [row["records_changed"] for row in document["rows"] if "records_changed" in row] == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["steady.json"]
    assert os.environ["MEMOS_ENGINE_KEYS"] == "elsewhere"
    assert not Path("elsewhere").exists()
    monkeypatch.setattr(steady, "traffic_of", lambda *_: pytest.fail("measured again"))
    again = steady.run(tiny(tiny_folder, recompute=(0.0, 0.3), out=tmp_path, resume=True))
    assert again["rows"] == document["rows"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n": 1}, "at least 2"),
        ({"memories": (1,)}, "too few orders"),
        ({"memories": (12,)}, "fewer --memories"),
        ({"random_weights": "tiny"}, "pulled model"),
        ({"device": "cuda"}, "on the CPU"),
    ],
)
def test_what_cannot_be_measured_is_refused(tiny_folder, options, match):
    with pytest.raises(ConfigError, match=match):
        steady.run(tiny(tiny_folder, **options))
