"""Questions, prompts and marks of `bench quality`."""

from __future__ import annotations

import json

import pytest
from memos_engine.bench import quality, xquad
from memos_engine.bench.options import Options

from memos_engine.config import ConfigError
from memos_engine.errors import MemosEngineError


def test_prompts_have_their_gold_and_an_order_of_their_own(engine, data):
    dataset = xquad.load("xquad_en", data)
    drawn = xquad.prompts(dataset, engine.layout, 3, Options(seed=1), 18)
    assert len(drawn) == len(dataset.questions) == 18
    assert {prompt.gold for prompt in drawn} == {0, 1, 2}
    for prompt in drawn:
        texts = [engine.tokenizer.decode(list(span)) for span in prompt.memories]
        assert len(set(texts)) == 3
        assert prompt.answers[0] in texts[prompt.gold]
    again = xquad.prompts(dataset, engine.layout, 3, Options(seed=1), 5)
    assert again == drawn[:5]
    assert xquad.prompts(dataset, engine.layout, 3, Options(seed=2), 5) != drawn[:5]
    more = xquad.prompts(dataset, engine.layout, 5, Options(seed=1), 5)
    assert [p.query for p in more] == [p.query for p in drawn[:5]]
    with pytest.raises(ConfigError, match="9 paragraphs"):
        xquad.prompts(dataset, engine.layout, 10, Options(), 1)


def test_passages_are_even_whole_sentences_and_never_cut_an_answer():
    text = "One two three. Four five six. Seven eight. Nine ten eleven twelve."
    ranges = xquad.passages(text, [], 6, lambda piece: len(piece.split()))
    assert [text[a:b].strip() for a, b in ranges] == [
        "One two three. Four five six.",
        "Seven eight. Nine ten eleven twelve.",
    ]
    across = text.index("six"), text.index("eight") + 5
    ranges = xquad.passages(text, [across], 4, lambda piece: len(piece.split()))
    assert any(a <= across[0] and across[1] <= b for a, b in ranges)
    assert "".join(text[a:b] for a, b in ranges) == text


@pytest.mark.parametrize(
    ("answer", "gold", "f1", "contains"),
    [
        ("The Denver Broncos.", ["Denver Broncos"], 1.0, True),
        ("the denver broncos won", ["Denver Broncos"], 0.8, True),
        ("Broncos", ["Carolina", "Denver Broncos"], 2 / 3, False),
        ("13080 points", ["308"], 0.0, False),
        ("", ["308"], 0.0, False),
        ("a a an", ["the"], 1.0, True),
    ],
)
def test_answers_are_marked_as_squad_marks_them(answer, gold, f1, contains):
    assert xquad.answer_f1(answer, gold) == pytest.approx(f1)
    assert xquad.answer_contains(answer, gold) is contains


def test_missing_or_foreign_data_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(MemosEngineError, match=r"--data or MEMOS_ENGINE_DATA"):
        quality.run(Options(data=tmp_path))
    monkeypatch.setenv("MEMOS_ENGINE_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(MemosEngineError, match="nowhere"):
        xquad.load("xquad_en", None)
    (tmp_path / "other.json").write_text('{"data": [{"paragraphs": 3}]}')
    with pytest.raises(MemosEngineError, match=r"other\.json is not a question set"):
        xquad.load("xquad_en", tmp_path)
    (tmp_path / "more.json").write_text("{}")
    with pytest.raises(MemosEngineError, match="2 JSON files"):
        xquad.load("xquad_en", tmp_path)


def test_dialogues_become_paragraphs_with_their_evidence(tmp_path):
    """LoCoMo's format: a session is a paragraph; a question stays where one turn holds its evidence."""
    turns = [("Ann", "D1:1", "I moved to Ulm."), ("Bob", "D1:2", "How nice!")]
    session = [{"speaker": who, "dia_id": place, "text": text} for who, place, text in turns]
    later = [{"speaker": "Bob", "dia_id": "D2:1", "text": "It rains."}]
    asked = [
        {"question": "Where does Ann live?", "answer": "Ulm", "evidence": ["D1:1"], "category": 4},
        {"question": "When did it rain?", "answer": 2020, "evidence": ["D2:1"], "category": 2},
        {"question": "Both?", "answer": "yes", "evidence": ["D1:1", "D2:1"], "category": 1},
        {"question": "A trap?", "adversarial_answer": "no", "evidence": ["D1:2"], "category": 5},
    ]
    talk = {
        "session_1_date_time": "1 May",
        "session_1": session,
        "session_2_date_time": "2 May",
        "session_2": later,
    }
    (tmp_path / "locomo10.json").write_text(json.dumps([{"conversation": talk, "qa": asked}]))
    found = xquad.load("locomo", tmp_path)
    assert found.paragraphs == ("(1 May)\nAnn: I moved to Ulm.\nBob: How nice!", "(2 May)\nBob: It rains.")
    first, second = found.questions
    assert found.paragraphs[first.paragraph][first.start : first.end] == "Ann: I moved to Ulm."
    assert found.paragraphs[second.paragraph][second.start : second.end] == "Bob: It rains."
    assert second.answers == ("2020",)
