"""LoCoMo's dialogues (Maharana et al., arXiv 2402.17753) in SQuAD's format, for `bench quality`.

A session is a paragraph of lines "speaker: text" under its date; a question is kept where a single turn holds
its evidence, which then stands for the answer's place. CC BY-NC 4.0: read where it lies.
"""

from __future__ import annotations

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
