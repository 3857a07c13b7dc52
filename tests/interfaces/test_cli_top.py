"""`memos-engine top`: what is worth most comes first; others' memories and jobs are not shown."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from memos_engine.interfaces import cli, options
from memos_engine.memory.governance import Principal
from memos_engine.memory.store import MemoryStore

ALICE, BOB = Principal("default", "alice"), Principal("default", "bob")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(options.console, "_width", 160)
    with MemoryStore.open(tmp_path / "store") as store:
        dog = store.add(ALICE, "My dog is called Biscuit.")
        store.add(ALICE, "Alice lives in Paris, near the river.")
        cat = store.add(BOB, "My cat is called Tom.")
        store.put_kv(ALICE, dog.id, 1, "i", b"record" * 9, 300)
        store.record_use(ALICE, [dog.id, dog.id])
        store.queue_job(ALICE, "encode", [dog.id], value=2.0)
        store.queue_job(BOB, "encode", [cat.id], value=9.0)
    return tmp_path / "store"


def run(place, *args):
    result = CliRunner().invoke(
        cli.app, ["top", "--store", str(place), "--user", "alice", *args], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return result.stdout


def test_one_document(place):
    found = json.loads(run(place, "--json"))
    assert [m["tokens"] for m in found["memories"]] == [300, 9]
    assert found["memories"][0]["value"] == pytest.approx(300 * found["memories"][0]["uses_per_day"])
    assert (found["memories"][0]["kv_records"], found["memories"][0]["kv_bytes"]) == (1, 54)
    assert [job["value"] for job in found["jobs"]] == [2.0]
    assert found["engine"] == {}


def test_a_look_with_what_the_engine_said(place):
    text = run(place, "--once")
    assert "no engine" in text
    assert "Biscuit" in text
    assert "Tom" not in text
    tiers = {"host": {"records": 3, "nbytes": 1234, "most": 5000, "hit_share": 0.25}}
    (place / "status.json").write_text(json.dumps({"at": "now", "tiers": tiers}))
    text = run(place, "--once")
    assert "1,234" in text
    assert "25%" in text
    (place / "status.json").write_text("{torn")
    assert "no engine" in run(place, "--once")
