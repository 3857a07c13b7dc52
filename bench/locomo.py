"""LoCoMo's dialogues (Maharana et al., arXiv 2402.17753) in SQuAD's format and, below, as memories.

A session is a paragraph of lines "speaker: text" under its date; a question is kept where a single turn holds
its evidence, which then stands for the answer's place. CC BY-NC 4.0: read where it lies.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import count
from typing import Any


def as_squad(dialogues: list[dict[str, Any]]) -> dict[str, Any]:
    """SQuAD's JSON with one article a dialogue. An answer's `answer_end` closes the range of its turn."""
    return {"data": [{"paragraphs": _paragraphs(dialogue)} for dialogue in dialogues]}


def _paragraphs(dialogue: dict[str, Any]) -> list[dict[str, Any]]:
    conversation = dialogue["conversation"]
    place: dict[str, tuple[int, int, int]] = {}
    out: list[dict[str, Any]] = []
    for number in count(1):
        turns = conversation.get(f"session_{number}")
        if turns is None:
            break
        text = f"({conversation[f'session_{number}_date_time']})"
        for turn in turns:
            start = len(text) + 1
            text += f"\n{turn['speaker']}: {turn['text'].strip()}"
            place[turn["dia_id"]] = (len(out), start, len(text))
        out.append({"context": text, "qas": []})
    for item in dialogue["qa"]:
        evidence = item["evidence"]
        if len(evidence) == 1 and evidence[0] in place and "answer" in item:
            where, start, end = place[evidence[0]]
            answer = {"text": str(item["answer"]), "answer_start": start, "answer_end": end}
            out[where]["qas"].append({"question": item["question"], "answers": [answer]})
    return out


# -- as memories, for `bench retrieval` ------------------------------------------------------------------

CATEGORIES = {1: "multi_hop", 2: "temporal", 3: "open_domain", 4: "single_hop", 5: "adversarial"}
_EVIDENCE = re.compile(r"D:?(\d+):(\d+)")
_DATE = "%I:%M %p on %d %B, %Y"


@dataclass(frozen=True)
class Turn:
    """One turn as a memory: `speaker: text`, with the caption of the picture that was sent along."""

    text: str
    session: str
    at: datetime


@dataclass(frozen=True)
class Sought:
    """A question, its category, the numbers of the turns that hold its evidence (at least one), and the
    answer (empty: there is none)."""

    text: str
    category: str
    evidence: tuple[int, ...]
    answer: str = ""


@dataclass(frozen=True)
class Dialogue:
    turns: tuple[Turn, ...]
    questions: tuple[Sought, ...]


def dialogues(raw: list[dict[str, Any]]) -> list[Dialogue]:
    """All turns in order, and the questions whose evidence names a turn that is there."""
    return [_dialogue(one) for one in raw]


def _dialogue(raw: dict[str, Any]) -> Dialogue:
    conversation = raw["conversation"]
    turns: list[Turn] = []
    place: dict[tuple[int, int], int] = {}
    for number in count(1):
        session = conversation.get(f"session_{number}")
        if session is None:
            break
        at = datetime.strptime(conversation[f"session_{number}_date_time"], _DATE)
        for turn in session:
            caption = f" [shares {turn['blip_caption']}]" if turn.get("blip_caption") else ""
            place[_turn_id(turn["dia_id"])] = len(turns)
            text = f"{turn['speaker']}: {turn['text'].strip()}{caption}"
            turns.append(Turn(text, str(number), at.replace(tzinfo=timezone.utc)))
    questions = []
    for item in raw["qa"]:
        named = [(int(a), int(b)) for one in item["evidence"] for a, b in _EVIDENCE.findall(one)]
        evidence = tuple(dict.fromkeys(place[one] for one in named if one in place))
        if evidence:
            answer, category = str(item.get("answer", "")), CATEGORIES[item["category"]]
            questions.append(Sought(item["question"], category, evidence, answer))
    return Dialogue(tuple(turns), tuple(questions))


def _turn_id(text: str) -> tuple[int, int]:
    session, turn = _EVIDENCE.findall(text)[0]
    return int(session), int(turn)
