"""One search's outcome: the order of what was found, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memos_engine.errors import MemoryNotFoundError
from memos_engine.memory.index import cosines
from memos_engine.memory.passages import Bools, Ints
from memos_engine.memory.retrieval import DIGITS, Ranking, RetrievalWeights, Scores
from memos_engine.memory.view import View


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a memory stands where it does; nothing in it depends on memories that the caller cannot see.

    `raw`, `scaled` and `weights` by view (see `RetrievalWeights`), `terms`: the query's words that the memory
    itself holds, with their rarity; `spread`: what its neighbours lent; `dated`: whether it lies in a time
    that the query names, `named`: whether its words name a time within that one; `relevance` is the outcome.
    `dropped`: the filters that it does not pass.
    """

    cube_id: str
    raw: Mapping[str, float]
    scaled: Mapping[str, float]
    weights: Mapping[str, float]
    terms: tuple[tuple[str, float], ...]
    spread: float
    dated: bool
    named: bool
    relevance: float
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Search:
    """A query's outcome over a view, good while the view's lock is held.

    `active` and `allowed` `[n]`: what scores counted, and what may be returned. `intervals`: the times that
    the query names. `query [dim]`: its embedding, None without an embedder.
    """

    view: View
    active: Bools
    allowed: Bools
    ranking: Ranking
    intervals: tuple[tuple[int, int], ...]
    query: npt.NDArray[np.float32] | None

    def order(
        self, min_score: float | None = None, *, matching_only: bool = False, first: int | None = None
    ) -> Ints:
        """Allowed rows, best first; equal ones by cosine, then older first.

        `matching_only`: none of no relevance. `first`: that many of them, or some more, are enough.
        """
        ranking, places = self.ranking, self.view.passages.place
        taken = self.allowed
        if matching_only:
            taken = taken & (ranking.relevance > 0)
        rows = np.flatnonzero(taken)
        if min_score is not None:
            rows = rows[np.round(self._scores(rows), DIGITS) >= min_score]
        if first is not None and len(rows) > first:
            least = np.partition(ranking.relevance[rows], -first)[-first]
            rows = rows[ranking.relevance[rows] >= least]
        score = np.round(self._scores(rows), DIGITS)
        return rows[np.lexsort((places[rows], -score, -ranking.relevance[rows]))]

    def scores(self, rows: Ints) -> list[float]:
        """What `Candidate.score` says of each row."""
        found = self._scores(rows)
        if self.query is not None and not self.view.exact:  # some were not looked at
            vectors = self.view.index.vectors(self.view.passages.keys[rows])
            found = cosines(self.query, vectors).astype(np.float64)
        return [round(float(score), DIGITS) for score in found]

    def _scores(self, rows: Ints) -> Scores:
        if self.query is not None:
            return self.ranking.raw["dense"][rows]
        rarity = np.array([rarity for _, rarity in self.ranking.terms])
        held = self.ranking.present[:, rows].astype(np.float64)
        return np.asarray(rarity @ held / (rarity.sum() or 1.0), dtype=np.float64)

    def row(self, cube_id: str) -> int:
        found = np.flatnonzero(self.view.passages.ids == cube_id.encode())
        if not len(found):
            raise MemoryNotFoundError(f"memory {cube_id!r} has no text to search.")
        return int(found[0])

    def explain(self, cube_id: str, weights: RetrievalWeights, dropped: Sequence[str] = ()) -> Explanation:
        """Why this memory, which must be among the passages, stands where it does."""
        ranking, row = self.ranking, self.row(cube_id)
        held = [term for term, here in zip(ranking.terms, ranking.present[:, row], strict=True) if here]
        return Explanation(
            cube_id,
            {view: round(float(values[row]), DIGITS) for view, values in ranking.raw.items()},
            {view: round(float(values[row]), DIGITS) for view, values in ranking.scaled.items()},
            {view: weights.of(view) for view in ranking.raw},
            tuple((stem, round(rarity, DIGITS)) for stem, rarity in held),
            round(float(ranking.spread[row]), DIGITS),
            bool(ranking.dated[row]),
            bool(ranking.named[row]),
            float(ranking.relevance[row]),
            tuple(dropped),
        )
