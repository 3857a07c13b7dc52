"""The command line: what people and programs read, and errors of one line."""

from __future__ import annotations

import json
import os
import sys

import pytest
from typer.testing import CliRunner

from memos_engine.errors import MemoryNotFoundError, NotAStoreError
from memos_engine.interfaces import cli
from memos_engine.memory import embed


@pytest.fixture(autouse=True)
def _hashing(monkeypatch, tiny_folder, tmp_path):
    monkeypatch.setattr("memos_engine.api.default_embedder", lambda: embed.HashingEmbedder(64))
    monkeypatch.setenv("MEMOS_ENGINE_MODEL", str(tiny_folder))
    monkeypatch.setenv("MEMOS_ENGINE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("MEMOS_ENGINE_USER", "alice")


def run(*args, **kwargs):
    return CliRunner().invoke(cli.app, [str(a) for a in args], catch_exceptions=False, **kwargs)


def data(*args):
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def test_remember_recall_history_forget():
    cube = data("remember", "My dog is called Biscuit.", "--tag", "pets")
    data("remember", "My sister lives in Lisbon.")
    found = data("recall", "dog called Biscuit", "-k", 1)
    assert [f["id"] for f in found] == [cube["id"]]
    assert "Biscuit" in run("recall", "dog").stdout
    assert data("forget", "Biscuit dog")[0]["id"] == cube["id"]
    assert len(data("recall", "dog")) == 2, "forget TEXT only shows"
    assert data("forget", "--id", cube["id"], "--how", "archive") == {"archived": [cube["id"]]}
    assert len(data("recall")) == 1
    assert data("restore", cube["id"])["id"] == cube["id"]
    assert len(data("recall")) == 2
    assert "Biscuit" in run("recall").stdout
    data("forget", "--id", cube["id"], "--how", "archive")
    data("forget", "--id", cube["id"], "--how", "erase")
    entries = data("history", cube["id"])
    assert [e["event"] for e in entries][-2:] == ["archived", "erased"]
    assert all(e["text"] is None for e in entries)
    assert "erased" in run("history", cube["id"]).stdout


def test_brackets_in_memories_are_shown_as_they_are():
    cube = data("remember", "see [/foo] and [bold]x[/bold]")
    for arguments in (("recall", "foo"), ("forget", "foo"), ("history", cube["id"])):
        assert "[/foo]" in run(*arguments).stdout


def test_forget_acts_on_all_ids_or_on_none():
    cube = data("remember", "I like tea.")
    with pytest.raises(MemoryNotFoundError):
        run("forget", "--id", cube["id"], "--id", "nonsense")
    assert [c["id"] for c in data("recall", "tea")] == [cube["id"]]


def test_looking_into_a_store_that_is_not_there_makes_none(tmp_path):
    with pytest.raises(NotAStoreError, match="no store"):
        run("recall", "x", "--store", tmp_path / "mistyped")
    assert not (tmp_path / "mistyped").exists()


def test_chat_answers_and_explains():
    data("remember", "My dog is called Biscuit.")
    reply = data("chat", "What is my dog called?", "--max-new-tokens", 4, "--dtype", "float32")
    assert {"text", "ttft_ms", "plan", "timings_ms"} <= set(reply)
    assert reply["plan"][0]["form"] == "text"
    again = data("chat", "What is my dog called?", "--max-new-tokens", 4, "--dtype", "float32")
    assert again["plan"][0]["form"] == "kv"
    assert "first token" in run("chat", "Hello", "--max-new-tokens", 3, "--int8").output


def test_a_conversation_over_standard_input():
    talk = run("chat", "--max-new-tokens", 3, "--json", input="Hello\n/remember I like tea.\nAnd now?\n\n")
    lines = [json.loads(line) for line in talk.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 2
    assert data("recall", "tea")[0]["body"] == "I like tea."


def test_doctor_models_and_version(tmp_path):
    run("remember", "x")
    report = data("doctor", "--store", tmp_path / "store")
    assert report["store"]["cubes"] == 1
    assert "paged_attention" in run("doctor").stdout
    assert isinstance(data("models", "list"), list)
    assert "0.1.0" in run("--version").stdout


@pytest.mark.parametrize(
    "arguments", [["forget"], ["forget", "text", "--id", "x"], ["forget", "x", "--how", "burn"]]
)
def test_contradictory_arguments_are_usage_errors(arguments):
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["recall", "", "--store", "STORE"], "MemoryInputError"),
        (["recall", "x", "--store", "f[/z]"], "NotAStoreError"),
        (["chat", "x", "--seed", "99999999999999999999999"], "ConfigError"),
        (["bench", "ttft", "--peers", "foo"], "ConfigError"),
        (["bench", "ttft", "--context", "-5"], "ConfigError"),
        (["remember", "   "], "MemoryInputError"),
        (["forget", "--id", "nobody"], "MemoryNotFoundError"),
        (["history", "nobody"], "MemoryNotFoundError"),
        (["recall", "x", "--model", "no/such-model"], "ModelFilesError"),
        (["recall", "x", "--store", __file__], "NotAStoreError"),
        (["chat", "x", "--form", "magic"], "ConfigError"),
    ],
)
def test_expected_errors_are_one_line(arguments, kind, monkeypatch, capsys):
    data("remember", "x")
    arguments = [os.environ["MEMOS_ENGINE_STORE"] if a == "STORE" else a for a in arguments]
    monkeypatch.setattr(sys, "argv", ["memos-engine", *arguments, "--json"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"] == kind
    assert "Traceback" not in captured.err


def test_bench_writes_json_and_a_report_and_compares(tiny_folder, tmp_path):
    arguments = (
        "bench", "ttft", "--model", tiny_folder, "--dtype", "float32", "--context", 96, "--query", 16,
        "--memories", 3, "--n", 2, "--peers", "none", "--out", tmp_path,
    )  # fmt: skip
    document = data(*arguments)
    assert document["bench"] == "ttft"
    assert {"version", "machine", "config", "rows"} <= set(document)
    assert {r["mode"] for r in document["rows"]} == {"full", "prefix", "splice", "query_only"}
    written = json.loads((tmp_path / "ttft.json").read_text())
    assert written["rows"] == document["rows"]
    assert "<html" in (tmp_path / "report.html").read_text()
    path = tmp_path / "ttft.json"
    compared = data("bench", "compare", path, path)
    assert compared["regressions"] == 0
    assert data("bench", "report", tmp_path)["written"][0].endswith("report.html")
    assert "Ratios within this run" in run(*arguments, "--resume").stdout


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["bench", "compare", "missing.json", "missing.json"], "ReportFolderError"),
        (["bench", "report", "missing"], "ReportFolderError"),
        (["bench", "decode", "--random-weights", "nonsense"], "ConfigError"),
        (["bench", "roofline", "--quick", "--out", "/proc/no/such"], "ReportFolderError"),
        (["bench", "quality", "--data", "missing"], "DatasetError"),
    ],
)
def test_bench_refuses_in_one_line(arguments, kind, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memos-engine", *arguments, "--json"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    assert json.loads(capsys.readouterr().out)["error"] == kind


def test_bench_peers_are_listed_with_their_reasons():
    rows = {row["name"]: row for row in data("bench", "peers")}
    assert rows["transformers"]["installed"] is True
    assert rows["flashinfer"]["why"]


@pytest.mark.smollm2
def test_bench_memory_gives_its_row(smollm2_path):
    (row,) = data("bench", "memory", "--model", smollm2_path, "--dtype", "bfloat16")["rows"]
    assert row["peak_mb"] > 0
    assert row["spliced_tokens"] > 0


@pytest.mark.smollm2
@pytest.mark.slow
def test_the_demo_runs_in_two_processes(smollm2_path, minilm_path):
    result = data("demo", "--model", smollm2_path)
    assert result["pid"] != result["answering_pid"]
    assert result["memories"] >= 15
    assert result["longest"] >= 600
    assert len(result["questions"]) == 10
    assert result["foreign_memories"] == 0
    assert set(result["summary"]) == {"none", "text", "kv"}
    forms = {form for row in result["questions"] for form in row["modes"]["kv"]["forms"]}
    assert forms == {"kv"}
