"""MemReader against a table of utterances, utterances that no rule was made for, and noise."""

from __future__ import annotations

import importlib.util
import json
import re
import time
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_engine.errors import MemoryInputError
from memos_engine.memory.call import Intent, MemoryCall
from memos_engine.memory.governance import Principal
from memos_engine.memory.reader import MemReader


def _sibling(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLE = _sibling("reader_table").TABLE
HELD_OUT = _sibling("reader_held_out").HELD_OUT
ALICE = Principal("acme", "alice")
NOW = datetime(2026, 11, 25, 12, tzinfo=timezone.utc)  # a Wednesday
READER = MemReader()


def read(utterance: str, *history: str, **options: Any) -> MemoryCall:
    return READER.read(ALICE, utterance, now=NOW, history=history, **options)


@pytest.mark.parametrize("said", TABLE, ids=lambda said: said.utterance[:40])
def test_what_people_say(said: Any) -> None:
    call = read(said.utterance, *said.history)
    assert call.intent == said.intent, call.reasons
    assert said.text is None or call.text == said.text
    assert call.reasons


def test_the_table_is_large_and_balanced() -> None:
    counts = [sum(said.intent == intent for said in TABLE) for intent in Intent]
    assert sum(counts) >= 120
    assert min(counts) >= 24


def test_utterances_that_no_rule_was_made_for() -> None:
    """docs/reader.md says how many were right when they were counted first; fewer would be a step back."""
    assert len(HELD_OUT) == 60
    right = sum(read(utterance).intent == intent for utterance, intent, *_ in HELD_OUT)
    assert right >= 47


def test_where_nothing_fits_nothing_is_written() -> None:
    for text in ("blorp fnord", "明日の天気", "🙂🙂", "...", "a", "-- ; DROP TABLE cube", "x" * 5000):
        assert read(text).intent is Intent.QUESTION


@pytest.mark.parametrize(
    ("text", "scope"),
    [
        ("Remember that the alarm code is 4711", "private"),
        ("Remember for everyone that the alarm code is 4711", "shared"),
        ("What do you know about the alarm?", "all"),
        ("What do you know about the alarm in the shared notes?", "shared"),
        ("Find the alarm code in my own notes", "private"),
    ],
)
def test_whose_memories(text: str, scope: str) -> None:
    assert read(text).scope == scope


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("I love olives", "preference"),
        ("My favourite colour is green", "preference"),
        ("From now on, call me Max.", "task_prompt"),
        ("Remember to always answer in German", "fact"),
        ("I live in Rome", "fact"),
        ("What do you remember about my preferences?", "preference"),
        ("What do you remember about Rome?", None),
    ],
)
def test_what_kind_of_memory(text: str, kind: str | None) -> None:
    assert read(text).semantic_type == kind


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("What did I say yesterday about Rome?", "2026-11-24", "2026-11-24"),
        ("What did I tell you about Anna in May 2023?", "2023-05-01", "2023-05-31"),
        ("What did I say between 3 May 2025 and 9 May 2025?", "2025-05-03", "2025-05-09"),
        ("What did I say on 3 December?", "2025-12-03", "2025-12-03"),
        ("Remember that my exam is on 3 December", "2026-12-03", "2026-12-03"),
        ("Remember that my exam is on 3 May", "2027-05-03", "2027-05-03"),
        ("Remember that we meet on Friday", "2026-11-27", "2026-11-27"),
        ("Remember that we met on Friday", "2026-11-20", "2026-11-20"),
        ("What did we do last month?", "2026-10-01", "2026-10-31"),
    ],
)
def test_the_time_spoken_of(text: str, first: str, last: str) -> None:
    window = read(text).window
    assert window is not None
    assert tuple(moment.date().isoformat() for moment in window) == (first, last)
    assert "time-window" in read(text).reasons


def test_names_and_quotations() -> None:
    call = read('Remember that Anna Smith and Bob read "War and Peace" in Rome on Monday.')
    assert set(call.entities) == {"Anna Smith", "Bob", "Rome", "War and Peace"}
    assert read("Don't forget that Anna comes").entities == ("Anna",)
    assert read("The dog is brown.").entities == ()


def test_that_means_the_turn_before_where_it_can() -> None:
    call = read("Remember that.", "My dog is called Biscuit.")
    assert (call.text, call.anchor) == ("My dog is called Biscuit.", "My dog is called Biscuit.")
    asked = read("Remember that.", "What is the time?")  # a question is nothing to remember
    assert (asked.text, asked.anchor) == ("", None)
    assert "nothing-named" in asked.reasons
    named = read("Remember that it rains.", "My dog is called Biscuit.")
    assert (named.text, named.anchor) == ("it rains.", None)


def test_a_model_is_asked_where_no_rule_decides_and_never_under_a_budget() -> None:
    asked: list[str] = []

    def choose(question: str, options: Any) -> int:
        asked.append(question)
        return next(i for i, option in enumerate(options) if "remembered" in option)

    reader = MemReader(choose)
    chosen = reader.read(ALICE, "blorp fnord", now=NOW)
    assert (chosen.intent, chosen.reasons) == (Intent.REMEMBER, ("chosen-by-model",))
    assert reader.read(ALICE, "blorp fnord", now=NOW, budget_ms=1e9).reasons == ("undecided",)
    assert reader.read(ALICE, "Forget my old address.", now=NOW).intent is Intent.FORGET
    assert len(asked) == 1
    for wrong in (5, -1, None, True):
        with pytest.raises(MemoryInputError, match="index of an option"):
            MemReader(lambda question, options, wrong=wrong: wrong).read(ALICE, "blorp fnord", now=NOW)


@pytest.mark.parametrize("bad", ["", "  ", "a\0b", "\ud800", 5, None, b"x", "x" * 1_000_001])
def test_what_is_no_text_is_refused(bad: Any) -> None:
    with pytest.raises(MemoryInputError):
        read(bad)
    with pytest.raises(MemoryInputError):
        read("Remember that.", bad)


def test_other_wrong_arguments() -> None:
    with pytest.raises(MemoryInputError, match="list of texts"):
        READER.read(ALICE, "Remember that.", now=NOW, history="one")
    with pytest.raises(MemoryInputError, match="time zone"):
        READER.read(ALICE, "hello", now=datetime(2026, 1, 1))
    with pytest.raises(MemoryInputError, match="caller"):
        READER.read("alice", "hello", now=NOW)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "piece",
    ["forget ", "a", " ", "never mind, ", "the day, ", "I ", "what ", '"', "not ", "in May ", "Ann ", "?! "],
)
def test_a_megabyte_of_anything_is_read_at_once(piece: str) -> None:
    text = "Remember that " + (piece * 1_000_000)[: 1_000_000 - 15]
    begun = time.perf_counter()
    for utterance in (text, text[14:] + "x"):
        assert read(utterance).text in utterance
    assert time.perf_counter() - begun < 10  # far more than it takes, far less than backtracking would


PIECES = st.sampled_from(
    [
        "forget",
        "remember",
        "that",
        "it",
        ",",
        ".",
        "?",
        "!",
        "don't",
        "do",
        "not",
        "never",
        "mind",
        "actually",
        "no",
        "my",
        "dog",
        "is",
        "what",
        "did",
        "I",
        "say",
        "you",
        "know",
        "about",
        "Anna",
        "yesterday",
        "please",
        "could",
        "'x'",
        '"',
        "please:",
        "note",
        "update",
        "to",
        "change",
        "in",
        "May",
        "2023",
        "last",
        "week",
        "👋",
        "\u200fשלום",
        "’",
        "\n",
    ]
)
utterances = st.text(max_size=60) | st.lists(PIECES, min_size=1, max_size=14).map(" ".join)


@given(utterances, st.lists(utterances, max_size=2))
def test_any_text_gives_a_call_or_a_clear_error(text: str, history: list[str]) -> None:
    try:
        call = read(text, *history)
    except MemoryInputError:
        return
    assert call == read(text, *history)
    if call.anchor is None:
        assert call.text in text
    else:
        assert call.text == history[-1].strip()
    assert all(name in call.text for name in call.entities if " " not in name)
    again = MemoryCall.from_dict(json.loads(json.dumps(call.to_dict())))
    assert again == call


@pytest.mark.parametrize(
    "wrong",
    [
        {"caller": "alice"},
        {"intent": "remember"},
        {"text": 5},
        {"text": None},
        {"text": "a\0"},
        {"entities": ["a"]},
        {"entities": ("",)},
        {"scope": "mine"},
        {"semantic_type": "A B"},
        {"anchor": ""},
        {"window": (NOW,)},
        {"window": (NOW, datetime(2026, 1, 1))},
        {"window": (NOW, datetime(2020, 1, 1, tzinfo=timezone.utc))},
        {"reasons": [1]},
    ],
)
def test_a_call_is_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(MemoryInputError):
        MemoryCall(**{"caller": ALICE, "intent": Intent.RECALL, "text": "x", **wrong})


@pytest.mark.parametrize("wrong", [{}, {"intent": "x"}, {"window": 5}, {"caller": None}, {"text": []}])
def test_other_dictionaries_are_refused(wrong: dict[str, Any]) -> None:
    good = MemoryCall(ALICE, Intent.RECALL, "x").to_dict()
    with pytest.raises(MemoryInputError):
        MemoryCall.from_dict({**good, **wrong} if wrong else {})


def test_the_page_about_it_says_what_it_does() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reader.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}
    exec(found[1], names)
    call = names["call"]
    assert (call.intent, call.text, call.entities) == (Intent.REMEMBER, "Anna comes on Friday.", ("Anna",))
    assert call.reasons == ("politeness", "not-forget", "time-window")
