"""Questions over paragraphs in SQuAD's format (XQuAD English by default): prompts, and marks for answers.

XQuAD (Artetxe et al., arXiv 1910.11856) is 1,190 questions over 240 paragraphs, CC BY-SA 4.0. It is read
where it lies and never becomes part of the project.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from memos_engine.bench.locomo import as_squad
from memos_engine.bench.options import Options

from memos_engine.config import ConfigError
from memos_engine.errors import MemosEngineError
from memos_engine.prompt import PromptLayout

DATA_VARIABLE = "MEMOS_ENGINE_DATA"
# Memory tokens of one prompt, about, whatever the number of memories: with 3 most paragraphs stay nearly
# whole, with 8 a memory is a sentence or two.
MEMORY_TOKENS = 420

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


class DatasetError(MemosEngineError):
    """An evaluation set is not there or cannot be read; the message says what to do."""


@dataclass(frozen=True)
class Question:
    """answers: all accepted texts; start, end: where in the paragraph the first one stands."""

    text: str
    answers: tuple[str, ...]
    paragraph: int
    start: int
    end: int


@dataclass(frozen=True)
class Dataset:
    """paragraphs, and questions that name theirs by number."""

    paragraphs: tuple[str, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Prompt:
    """One prompt as spans of token ids: anchor | memories | query. gold: the slot that holds the answer.

    index: its place in the run, from 0; key: names it, its memories and its seed.
    """

    index: int
    key: str
    memories: tuple[tuple[int, ...], ...]
    gold: int
    query: tuple[int, ...]
    answers: tuple[str, ...]


# -- loading -----------------------------------------------------------------------------------------


def load(name: str, data: Path | None) -> Dataset:
    """Reads `<folder>/<name>/*.json`, or `<folder>/*.json` where the folder is the set itself; LoCoMo's
    format too.

    Folders tried: `data`, else the environment variable, else `../shared/datasets` beside a checkout.
    """
    path = find(name, data)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        articles = (as_squad(raw) if isinstance(raw, list) else raw)["data"]
        paragraphs: list[str] = []
        questions: list[Question] = []
        for paragraph in (p for article in articles for p in article["paragraphs"]):
            for item in paragraph["qas"]:
                if not item["answers"]:  # SQuAD 2 has questions without
                    continue
                answers = tuple(answer["text"] for answer in item["answers"])
                start = int(item["answers"][0]["answer_start"])
                end = int(item["answers"][0].get("answer_end", start + len(answers[0])))
                questions.append(Question(item["question"], answers, len(paragraphs), start, end))
            paragraphs.append(paragraph["context"])
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DatasetError(f"{path} is not a question set in SQuAD's JSON format ({error!r}).") from error
    if not questions:
        raise DatasetError(f"{path} holds no question with an answer.")
    return Dataset(tuple(paragraphs), tuple(questions))


def find(name: str, data: Path | None) -> Path:
    """The set's JSON file; DatasetError says where it was looked for."""
    variable = os.environ.get(DATA_VARIABLE)
    if data is not None:
        folders = [data]
    elif variable:
        folders = [Path(variable)]
    else:
        folders = [Path(__file__).resolve().parents[2] / "shared" / "datasets"]
    for folder in (f for top in folders for f in (top / name, top)):
        files = sorted(folder.glob("*.json"))
        if len(files) == 1:
            return files[0]
        if files:
            raise DatasetError(f"{folder} holds {len(files)} JSON files; --data needs a folder with one.")
    raise DatasetError(
        f"The question set {name} is not in {folders[0]}. Download xquad.en.json from "
        f"https://github.com/google-deepmind/xquad into a folder {name}, and name the folder above it with "
        f"--data or {DATA_VARIABLE}."
    )


# -- prompts -----------------------------------------------------------------------------------------


def prompts(
    dataset: Dataset, layout: PromptLayout, memories: int, options: Options, rounds: int
) -> list[Prompt]:
    """Draws `rounds` questions (all, if there are fewer); each gets its gold memory and `memories - 1` from
    other paragraphs, in an order of its own. Every draw hangs on the seed and the prompt's number alone, and
    the questions are the same for every number of memories."""
    if memories > len(dataset.paragraphs):
        raise ConfigError(f"memories {memories}: the set has {len(dataset.paragraphs)} paragraphs.")
    cut = _cut(dataset, layout, memories)
    chosen = list(range(len(dataset.questions)))
    random.Random(f"questions/{options.seed}").shuffle(chosen)
    out = []
    for index, number in enumerate(chosen[:rounds]):
        question = dataset.questions[number]
        key = f"{options.seed}/{memories}/{index}"
        rng = random.Random(key)
        others = [p for p in range(len(dataset.paragraphs)) if p != question.paragraph]
        texts = [_holding(cut[question.paragraph], question, dataset.paragraphs[question.paragraph])]
        for paragraph in rng.sample(others, memories - 1):
            start, end = rng.choice(cut[paragraph])
            texts.append(dataset.paragraphs[paragraph][start:end])
        order = rng.sample(range(memories), memories)
        spans = tuple(layout.memory(texts[i]) for i in order)
        query = layout.query(question.text)
        out.append(Prompt(index, key, spans, order.index(0), query, question.answers))
    return out


def memory_spans(dataset: Dataset, layout: PromptLayout, memories: int) -> list[tuple[int, ...]]:
    """All memories that prompts of so many can hold, in the set's order: what their owner keeps."""
    cut = zip(dataset.paragraphs, _cut(dataset, layout, memories), strict=True)
    return [layout.memory(text[start:end]) for text, ranges in cut for start, end in ranges]


def _cut(dataset: Dataset, layout: PromptLayout, memories: int) -> list[list[tuple[int, int]]]:
    """Each paragraph's passages, as character ranges."""
    marks = len(layout.memory("x")) - 1
    return [
        passages(
            text,
            [(q.start, q.end) for q in dataset.questions if q.paragraph == number],
            MEMORY_TOKENS // memories,
            lambda piece: len(layout.memory(piece)) - marks,
        )
        for number, text in enumerate(dataset.paragraphs)
    ]


def passages(
    text: str, answers: Sequence[tuple[int, int]], limit: int, count: Callable[[str], int]
) -> list[tuple[int, int]]:
    """Cuts a paragraph into runs of whole sentences, as even as can be, of about `limit` tokens at most.

    No cut falls inside an answer. Returns character ranges; a single long sentence stays whole.
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    cuts = [0, *(e for e in ends if not any(a < e < b for a, b in answers)), len(text)]
    sizes = [count(text[a:b]) for a, b in pairwise(cuts)]
    aim = sum(sizes) / max(1, math.ceil(sum(sizes) / limit))
    out, begin, size = [], 0, 0
    for start, more in zip(cuts, sizes, strict=False):
        if size and size + more / 2 > aim:
            out.append((begin, start))
            begin, size = start, 0
        size += more
    return [*out, (begin, len(text))]


def _holding(ranges: Sequence[tuple[int, int]], question: Question, text: str) -> str:
    for start, end in ranges:
        if start <= question.start and question.end <= end:
            return text[start:end]
    raise DatasetError(f"The answer of {question.text!r} does not lie in its paragraph; is the file damaged?")


# -- answers -----------------------------------------------------------------------------------------


def normalised(text: str) -> str:
    """SQuAD's normalisation (Rajpurkar et al., arXiv 1606.05250): lower case, no punctuation, no articles."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def answer_f1(answer: str, gold: Sequence[str]) -> float:
    """Word F1 against the nearest accepted answer."""
    return max(_f1(normalised(answer).split(), normalised(text).split()) for text in gold)


def answer_contains(answer: str, gold: Sequence[str]) -> bool:
    """Whether an accepted answer stands in the text, word for word."""
    words = f" {normalised(answer)} "
    return any(f" {normalised(text)} " in words for text in gold)


def _f1(words: list[str], gold: list[str]) -> float:
    if not words or not gold:
        return float(words == gold)
    common = sum((Counter(words) & Counter(gold)).values())
    return 2 * common / (len(words) + len(gold))
