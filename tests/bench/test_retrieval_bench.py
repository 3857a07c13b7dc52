"""`bench retrieval` on a LoCoMo of two small dialogues."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memos_engine.bench import report, retrieval
from memos_engine.bench.locomo import dialogues
from memos_engine.bench.options import Options
from memos_engine.bench.retrieval import Bm25, Chooser
from memos_engine.bench.xquad import DatasetError

from memos_engine.memory.embed import HashingEmbedder
from memos_engine.memory.retrieval import RetrievalWeights


def _dialogue(name: str) -> dict[str, Any]:
    def turn(number: int, text: str, **more: str) -> dict[str, str]:
        session, place = divmod(number, 10)
        return {"speaker": name, "dia_id": f"D{session + 1}:{place}", "text": text, **more}

    chatter = [turn(n, f"We spoke of the weather, part {n}") for n in range(3, 10)]
    return {
        "conversation": {
            "speaker_a": name,
            "session_1_date_time": "1:56 pm on 8 May, 2023",
            "session_1": [
                turn(1, "What is your dog called?"),
                turn(2, "Biscuit, of course!", blip_caption="a photo of a puppy"),
                *chatter,
            ],
            "session_2_date_time": "12:05 am on 2 June, 2023",
            "session_2": [turn(11, "I went camping in the hills"), turn(12, "My car broke down")],
        },
        "qa": [
            {"question": f"What is {name}'s dog called?", "answer": "B", "evidence": ["D1:2"], "category": 4},
            {"question": "Who sent a puppy?", "answer": "A", "evidence": ["D1:02; D2:2"], "category": 1},
            {"question": "What broke in June 2023?", "answer": "car", "evidence": ["D:2:2"], "category": 2},
            {"question": "Nothing to find?", "answer": "x", "evidence": [], "category": 5},
            {"question": "Not there?", "answer": "x", "evidence": ["D9:9"], "category": 3},
        ],
    }


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "locomo"
    folder.mkdir()
    (folder / "locomo10.json").write_text(json.dumps([_dialogue("Anna"), _dialogue("Ben")]))
    return tmp_path


def test_turns_become_memories_and_evidence_their_numbers() -> None:
    (one,) = dialogues([_dialogue("Anna")])
    assert one.turns[1].text == "Anna: Biscuit, of course! [shares a photo of a puppy]"
    assert one.turns[-1].session == "2"
    assert one.turns[-1].at.isoformat() == "2023-06-02T00:05:00+00:00"
    assert [(q.category, q.evidence) for q in one.questions] == [
        ("single_hop", (1,)),
        ("multi_hop", (1, 10)),
        ("temporal", (10,)),
    ]


def test_its_rows(data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(retrieval, "default_embedder", HashingEmbedder)
    document = retrieval.run(Options(data=data, out=tmp_path / "out"))
    rows = {row["retriever"]: row for row in document["rows"]}
    assert list(rows) == [
        *("bm25", "dense", "rrf", "memos_engine", "memos_engine_shipped"),
        *("memos_engine_words", "memos_engine_words_shipped"),
    ]
    for name, row in rows.items():
        assert row["n"] == 6
        assert 0 <= row["r_at_5"] <= row["r_at_10"] <= 1
        assert row["r_at_10_low"] <= row["r_at_10"] <= row["r_at_10_high"]
        assert ("search_ms_p50" in row) == name.startswith("memos_engine")
    assert rows["memos_engine"]["r_at_10_single_hop"] == 1  # the answer stands behind its question
    assert document["complete"]
    page, _ = report.build([document])
    assert "memos_engine, no embedder" in page
    assert "R@10, multi-hop" in page


def test_bm25_is_the_textbooks() -> None:
    scores = Bm25(["dog dog cat", "cat", "a bird"]).scores("The dogs")
    rarity = np.log1p((3 - 1 + 0.5) / (1 + 0.5))
    length = 1.2 * (1 - 0.75 + 0.75 * 3 / 2)
    assert scores == pytest.approx([rarity * 2 * 2.2 / (2 + length), 0, 0])


def test_a_half_never_chooses_its_own_weights() -> None:
    """The chooser reads marks of the other half alone."""

    class Spied(Chooser):
        def __init__(self) -> None:
            self._asked = [type("A", (), {"dialogue": n // 2})() for n in range(8)]  # type: ignore[assignment]
            self._search = lambda one: type("S", (), {"ranking": type("R", (), {"raw": {"words": 0}})})()

        def marks(self, weights: RetrievalWeights) -> Any:
            odd = np.array([one.dialogue % 2 == 1 for one in self._asked])
            liked = np.where(odd, weights.dated == 0.4, weights.dated == 0.15)  # each half has its taste
            return np.repeat(liked[:, None].astype(float), 3, axis=1)

    marks, (by_even, by_odd) = Spied().crossed()
    assert (by_even.dated, by_odd.dated) == (0.15, 0.4)
    assert not marks.any()


@pytest.mark.parametrize("content", ["{}", "[1]", "[]", "no json"])
def test_other_files_are_refused(data: Path, content: str) -> None:
    (data / "locomo" / "locomo10.json").write_text(content)
    with pytest.raises(DatasetError):
        retrieval.run(Options(data=data))
