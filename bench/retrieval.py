"""Evidence recall on LoCoMo's dialogues: of the turns that hold a question's evidence, how many are found.

Every turn is a memory, a question is asked of its own dialogue, no language model has a say. Weights are
chosen on half of the dialogues and scored on the other half, both ways; a row pools the two. CC BY-NC 4.0
data: read where it lies, nothing of it is kept.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from memos_engine.bench.document import Document
from memos_engine.bench.locomo import CATEGORIES, Dialogue, dialogues
from memos_engine.bench.options import Options, Progress, silent
from memos_engine.bench.stats import bootstrap, p95
from memos_engine.bench.xquad import DatasetError, find

from memos_engine.memory.embed import COMMON_WORDS, Embedder, HashingEmbedder, Vectors, default_embedder
from memos_engine.memory.filters import Filters
from memos_engine.memory.governance import KeyRing, Principal
from memos_engine.memory.operator import MemOperator
from memos_engine.memory.retrieval import RetrievalWeights, fuse
from memos_engine.memory.search import Search
from memos_engine.memory.store import MemoryStore
from memos_engine.memory.store_fts import Stemmer

DATASET = "locomo"
# What is tried, one weight after the other, twice over, from the plainest hybrid. The other weights stay.
START = RetrievalWeights(
    words_context=1.0, dense=1.0, dense_context=1.0, from_before=0.0, from_after=0.0, dated=0.0, named=0.0
)
GRID: dict[str, tuple[float, ...]] = {
    "words_context": (0.5, 1.0, 1.5, 2.0),
    "dense": (0.0, 0.25, 0.5, 1.0),
    "dense_context": (0.0, 0.5, 1.0, 1.5),
    "from_before": (0.0, 0.05, 0.1, 0.2),
    "from_after": (0.0, 0.1, 0.2, 0.3),
    "dated": (0.0, 0.15, 0.25, 0.4),
    "named": (0.0, 0.15, 0.25, 0.4),
}
SWEEPS = 2
RRF = 60
K1, B = 1.2, 0.75

Marks = npt.NDArray[np.float64]  # [questions, 3]: R@5, R@10, reciprocal rank


@dataclass(frozen=True)
class Asked:
    """A question: its dialogue's number, its category, its evidence, what each retriever made of it."""

    dialogue: int
    category: str
    evidence: tuple[int, ...]
    hybrid: Search
    words: Search
    bm25: npt.NDArray[np.float64]


class Remembered:
    """An embedder that has embedded everything beforehand, so that searches are timed without it."""

    def __init__(self, embedder: Embedder, texts: Sequence[str]) -> None:
        self.model_id, self.dim = embedder.model_id, embedder.dim
        unique = list(dict.fromkeys(texts))
        self._known = dict(zip(unique, embedder.embed(unique), strict=True))

    def embed(self, texts: Sequence[str]) -> Vectors:
        """`[len(texts), dim]` float32."""
        return np.stack([self._known[text] for text in texts])


def run(options: Options, progress: Progress = silent) -> dict[str, Any]:
    """The result document of `bench retrieval`."""
    document = Document("retrieval", options)
    if not document.has(DATASET):
        found = _load(options)
        document.add(DATASET, *_measured(found, progress))
    return document.finish()


def _load(options: Options) -> list[Dialogue]:
    path = find(DATASET, options.data)
    try:
        found = dialogues(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DatasetError(f"{path} is not LoCoMo's JSON ({error!r}).") from error
    if not any(one.questions for one in found):
        raise DatasetError(f"{path} holds no question with evidence.")
    return found[:4] if options.quick else found


def _measured(
    found: list[Dialogue], progress: Progress
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    progress("embedding", 0, 4)
    embedder = default_embedder()
    notes = [
        "A turn is a memory: speaker, text, the caption of its picture; its session and date go with it. "
        "search_ms is one recall of 10 by the shipped weights, without embedding the question.",
    ]
    if isinstance(embedder, HashingEmbedder):
        notes.append("all-MiniLM-L6-v2 is not pulled: the dense views are hashed words.")
    texts = [turn.text for one in found for turn in one.turns]
    texts += [question.text for one in found for question in one.questions]
    known = Remembered(embedder, texts)
    with tempfile.TemporaryDirectory() as folder:
        keyring = KeyRing(Path(folder) / "keys")
        with MemoryStore.open(Path(folder) / "store", keyring=keyring) as store:
            progress("storing", 1, 4)
            hybrid, words = MemOperator(store, known), MemOperator(store)
            people = [_remember(hybrid, number, one) for number, one in enumerate(found)]
            progress("searching", 2, 4)
            times: dict[str, list[float]] = {"hybrid": [], "words": []}
            asked: list[Asked] = []
            for number, (who, one) in enumerate(zip(people, found, strict=True)):
                asked += _ask(number, who, one, hybrid, words, times)
    progress("choosing weights", 3, 4)
    return _rows(asked, times), [], notes


def _remember(operator: MemOperator, number: int, dialogue: Dialogue) -> Principal:
    who = Principal(DATASET, f"dialogue-{number}")
    for turn in dialogue.turns:
        operator.remember(who, turn.text, session=turn.session, valid_from=turn.at)
    return who


def _ask(
    number: int,
    who: Principal,
    dialogue: Dialogue,
    hybrid: MemOperator,
    words: MemOperator,
    times: dict[str, list[float]],
) -> list[Asked]:
    plain = Bm25([turn.text for turn in dialogue.turns])
    asked = []
    for question in dialogue.questions:
        searches = []
        for name, operator in (("hybrid", hybrid), ("words", words)):
            begun = time.perf_counter()
            operator.recall(who, question.text, k=10)
            times[name].append((time.perf_counter() - begun) * 1e3)
            view = operator.view(who)
            searches.append(operator.search(who, view, question.text, 10, Filters()))
        rank = plain.scores(question.text)
        asked.append(Asked(number, question.category, question.evidence, searches[0], searches[1], rank))
    return asked


class Bm25:
    """The usual BM25 over stems, without common words: what the others are compared with."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._stems = Stemmer()
        self._common = set(self._stems(" ".join(COMMON_WORDS)))
        counts = [self._stems(text) for text in texts]
        self._terms = {term: i for i, term in enumerate(dict.fromkeys(t for one in counts for t in one))}
        self._count = np.zeros((len(texts), len(self._terms)))
        for row, stems in enumerate(counts):
            for stem in stems:
                self._count[row, self._terms[stem]] += 1
        length = self._count.sum(axis=1, keepdims=True)
        held = (self._count > 0).sum(axis=0)
        rarity = np.log1p((len(texts) - held + 0.5) / (held + 0.5))
        scale = K1 * (1 - B + B * length / length.mean())
        self._weight = rarity * self._count * (K1 + 1) / (self._count + scale)

    def scores(self, query: str) -> npt.NDArray[np.float64]:
        """`[texts]`."""
        stems = [s for s in dict.fromkeys(self._stems(query)) if s not in self._common]
        at = [self._terms[stem] for stem in stems if stem in self._terms]
        return np.asarray(self._weight[:, at].sum(axis=1), dtype=np.float64)


# -- marks -------------------------------------------------------------------------------------------


def _marks(order: npt.NDArray[np.int64], evidence: Sequence[int]) -> tuple[float, float, float]:
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    ranks = place[list(evidence)]
    return float((ranks < 5).mean()), float((ranks < 10).mean()), 1 / (1 + float(ranks.min()))


def _ranked(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    return np.argsort(-np.round(scores, 6), kind="stable")


def _rrf(one: Asked) -> npt.NDArray[np.float64]:
    total = np.zeros(len(one.bm25))
    for scores in (one.bm25, one.hybrid.ranking.raw["dense"]):
        total[_ranked(scores)] += 1 / (RRF + 1 + np.arange(len(scores)))
    return total


class Chooser:
    """Marks of all questions by weights, each computed once, and the best weights for some dialogues."""

    def __init__(self, asked: Sequence[Asked], search: Callable[[Asked], Search]) -> None:
        self._asked, self._search = asked, search
        self._known: dict[RetrievalWeights, Marks] = {}

    def marks(self, weights: RetrievalWeights) -> Marks:
        """`[questions, 3]`."""
        if weights not in self._known:
            self._known[weights] = np.array([self._one(one, weights) for one in self._asked])
        return self._known[weights]

    def _one(self, one: Asked, weights: RetrievalWeights) -> tuple[float, float, float]:
        search = self._search(one)
        ranking = fuse(
            search.ranking.raw,
            search.view.passages,
            search.active,
            weights,
            intervals=search.intervals,
            terms=search.ranking.terms,
            present=search.ranking.present,
        )
        return _marks(replace(search, ranking=ranking).order(), one.evidence)

    def best(self, chosen: npt.NDArray[np.bool_]) -> RetrievalWeights:
        """One weight after the other, to the highest mean of R@5, R@10 and MRR over the chosen questions."""
        weights = START
        views = self._search(self._asked[0]).ranking.raw
        for _ in range(SWEEPS):
            for name, values in GRID.items():
                if name.startswith("dense") and "dense" not in views:
                    continue
                tried = [_with(weights, name, value) for value in values]
                weights = max(tried, key=lambda one: round(float(self.marks(one)[chosen].mean()), 6))
        return weights

    def crossed(self) -> tuple[Marks, tuple[RetrievalWeights, RetrievalWeights]]:
        """Marks of each half of the dialogues by the weights that the other half chose: even, odd."""
        odd = np.array([one.dialogue % 2 == 1 for one in self._asked])
        chosen = self.best(~odd), self.best(odd)
        return np.where(odd[:, None], self.marks(chosen[0]), self.marks(chosen[1])), chosen


def _with(weights: RetrievalWeights, name: str, value: float) -> RetrievalWeights:
    return RetrievalWeights(**{**asdict(weights), name: value})


# -- rows --------------------------------------------------------------------------------------------


def _rows(asked: list[Asked], times: dict[str, list[float]]) -> list[dict[str, Any]]:
    plain: dict[str, Callable[[Asked], npt.NDArray[np.float64]]] = {
        "bm25": lambda one: one.bm25,
        "dense": lambda one: one.hybrid.ranking.raw["dense"],
        "rrf": _rrf,
    }
    rows = [
        _row(name, asked, np.array([_marks(_ranked(score(one)), one.evidence) for one in asked]))
        for name, score in plain.items()
    ]
    for name, key, search in (
        ("memos_engine", "hybrid", lambda one: one.hybrid),
        ("memos_engine_words", "words", lambda one: one.words),
    ):
        chooser = Chooser(asked, search)
        marks, halves = chooser.crossed()
        timed = {
            "search_ms_p50": round(float(np.median(times[key])), 3),
            "search_ms_p95": round(p95(times[key]), 3),
        }
        rows.append({**_row(name, asked, marks), **timed, "weights": _said(halves)})
        shipped = _row(f"{name}_shipped", asked, chooser.marks(RetrievalWeights()))
        best = chooser.best(np.ones(len(asked), bool))
        rows.append({**shipped, **timed, "weights": _said([RetrievalWeights()]), "best": _said([best])})
    return rows


def _row(name: str, asked: list[Asked], marks: Marks) -> dict[str, Any]:
    interval = bootstrap(marks[:, 1].tolist())
    row: dict[str, Any] = {
        "dataset": DATASET,
        "retriever": name,
        "ours": name.startswith("memos_engine"),
        "r_at_5": round(float(marks[:, 0].mean()), 4),
        "r_at_10": round(interval.value, 4),
        "r_at_10_low": round(interval.low, 4),
        "r_at_10_high": round(interval.high, 4),
        "mrr": round(float(marks[:, 2].mean()), 4),
    }
    for category in CATEGORIES.values():
        own = np.array([one.category == category for one in asked])
        if own.any():
            row[f"r_at_10_{category}"] = round(float(marks[own, 1].mean()), 4)
    return {**row, "n": len(asked)}


def _said(weights: Sequence[RetrievalWeights]) -> str:
    """The weights that are tried, as text."""
    shown = [", ".join(f"{name} {asdict(one)[name]:g}" for name in GRID) for one in weights]
    return "; ".join(shown)
