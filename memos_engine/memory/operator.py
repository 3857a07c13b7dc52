"""MemOperator: from a query to the caller's memories that fit it best."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from memos_engine.errors import IntegrityError, MemoryInputError
from memos_engine.memory.cube import Fact, MemCube, Provenance, time_to_text, validate_text
from memos_engine.memory.embed import COMMON_WORDS
from memos_engine.memory.filters import Filters
from memos_engine.memory.governance import Principal
from memos_engine.memory.hnsw import IndexLimits
from memos_engine.memory.new import NewMemory
from memos_engine.memory.passages import Bools, Ints, microseconds
from memos_engine.memory.retrieval import RetrievalWeights, Scores, fuse, word_views
from memos_engine.memory.search import Explanation, Search
from memos_engine.memory.store import MemoryStore
from memos_engine.memory.store_fts import Stemmer
from memos_engine.memory.vectors import dense_views
from memos_engine.memory.view import Run, View, Views, in_background
from memos_engine.memory.when import intervals

if TYPE_CHECKING:
    from memos_engine.memory.embed import Embedder

BATCH = 32
"""Memories embedded at once when an embedder meets them for the first time."""
MAX_STEMS = 32
"""Stems of a query that are looked up; of more, the longest, which are the rarest as a rule."""
MAX_YEARS = 50
_POOL = 64  # where not all vectors are looked at: the fewest that are


@dataclass(frozen=True, slots=True)
class Candidate:
    """A memory that was found: `score` is its cosine to the query, -1 to 1, `relevance` (0 to 1) its place.

    Without an embedder `score` is the share of the query's words that it holds, by rarity.
    """

    cube: MemCube
    score: float
    relevance: float = 0.0
    explanation: Explanation | None = None


class MemOperator:
    """Hybrid retrieval over what the caller may see: by words and, with an embedder, by meaning."""

    def __init__(
        self,
        store: MemoryStore,
        embedder: Embedder | None = None,
        *,
        weights: RetrievalWeights | None = None,
        limits: IndexLimits | None = None,
        run: Run = in_background,
    ) -> None:
        """`run` starts what need not be waited for: building an index for very many memories."""
        self._store = store
        self._embedder = embedder
        self.weights = weights or RetrievalWeights()
        self._views = Views(store, limits, run)
        self._stems = Stemmer()
        self._common = {stem for word in COMMON_WORDS for stem in self._stems(word)}

    def remember(
        self,
        principal: Principal,
        text: str,
        *,
        tags: Iterable[str] = (),
        semantic_type: str = "fact",
        origin: str = "user_input",
        idempotency_key: str | None = None,
        session: str | None = None,
        valid_from: datetime | None = None,
        fact: Fact | None = None,
        provenance: Provenance | None = None,
        derived_from: Iterable[str] = (),
    ) -> MemCube:
        """Embed and store a new memory; see `MemoryStore.add` for its promises and errors."""
        new = NewMemory(
            text,
            tags=tags,
            semantic_type=semantic_type,
            origin=origin,
            idempotency_key=idempotency_key,
            session=session,
            valid_from=valid_from,
            fact=fact,
            provenance=provenance,
            derived_from=derived_from,
        )
        return self._store.add_many(principal, [self.embedded(new)])[0]

    def embedded(self, new: NewMemory) -> NewMemory:
        """The memory with its embedding, unless there is no embedder or it has one."""
        if self._embedder is None or new.vector is not None:
            return new
        return replace(new, vector=self._embed([new.text])[0], model_id=self._model_id)

    def recall(
        self,
        principal: Principal,
        text: str,
        k: int = 8,
        min_score: float | None = None,
        *,
        filters: Filters | None = None,
        explain: bool = False,
    ) -> list[Candidate]:
        """The caller's `k` live memories that fit `text` best, best first; none scored below `min_score`.

        Everything stored before the call can be found, also by an embedder that has not seen it yet. Equal
        relevance goes by score, then by age. Raises `MemoryInputError`.
        """
        validate_text(text)
        if k < 1:
            raise MemoryInputError(f"k must be at least 1, not {k}.")
        filters = filters or Filters()
        view = self.view(principal)
        with view.lock:
            search = self.search(principal, view, text, k, filters)
            found = self._collect(principal, search, k, min_score, filters)
            if not explain:
                return found
            return [
                Candidate(c.cube, c.score, c.relevance, search.explain(c.cube.id, self.weights))
                for c in found
            ]

    def explain(
        self, principal: Principal, text: str, cube_id: str, filters: Filters | None = None
    ) -> Explanation:
        """How one of the caller's memories fares with a query, and which filters drop it.

        Raises `MemoryNotFoundError` for one that is not there to see, `MemoryInputError`.
        """
        validate_text(text)
        filters = filters or Filters()
        self._store.get(principal, cube_id)
        view = self.view(principal)
        with view.lock:
            search = self.search(principal, view, text, len(view.passages) or 1, filters)
            row = search.row(cube_id)
            if not search.active[row]:
                return search.explain(cube_id, self.weights, ["states"])
            key, store = view.passages.keys[row], self._store
            dropped = [name for name, part in filters.parts() if key not in store.matching(principal, part)]
            return search.explain(cube_id, self.weights, dropped)

    # -- parts of a search -------------------------------------------------------------------------------

    def view(self, principal: Principal) -> View:
        """What this caller may search, to be used under its lock."""
        return self._views.get(principal, self._model_id)

    @property
    def _model_id(self) -> str:
        return "" if self._embedder is None else self._embedder.model_id

    def search(self, principal: Principal, view: View, text: str, k: int, filters: Filters) -> Search:
        """Rank all that the caller may see, under `view.lock`; at least `k` of it exactly."""
        view.refresh()
        now = self._store.now()
        passages = view.passages
        active = passages.active(filters.states, microseconds(time_to_text(now)))
        if self._embedder is not None and (active & ~passages.embedded).any():
            self._embed_missing(principal)
            view.refresh()
            active = passages.active(filters.states, microseconds(time_to_text(now)))
        allowed = active
        if filters.narrow:
            allowed = np.zeros(len(passages), np.bool_)
            allowed[passages.rows_of(self._store.matching(principal, filters))] = True
            allowed &= active
        postings = self._store.postings(principal, self.query_stems(text))
        raw, terms, present = word_views(passages, active, postings, self.weights)
        if self._embedder is not None:
            query = self._embed([text])[0]
            rows = None if view.exact else self._pool(view, query, k, allowed, raw)
            raw["dense"], raw["dense_context"] = dense_views(view.index, query, passages, active, rows)
        else:
            query = None
        times = self._intervals(text, now, passages.valid_from[active])
        ranking = fuse(raw, passages, active, self.weights, intervals=times, terms=terms, present=present)
        return Search(view, active, allowed, ranking, tuple(times), query)

    def query_stems(self, text: str) -> dict[str, str]:
        """The stems of a query that are looked up, with a word of each: common words only where there is
        nothing else."""
        words = self._stems.words(text)
        rare = [stem for stem in words if stem not in self._common] or list(words)
        return {stem: words[stem] for stem in sorted(rare, key=lambda s: (-len(s), s))[:MAX_STEMS]}

    def _intervals(self, text: str, now: datetime, valid_from: Ints) -> list[tuple[int, int]]:
        unused = self.weights.dated == self.weights.named == 0
        if unused or not intervals(text, now, [2000]):  # a leap year: every day exists
            return []
        days = np.unique(valid_from // 86_400_000_000).astype("datetime64[D]")
        years = np.unique(days.astype("datetime64[Y]").astype(np.int64) + 1970)[-MAX_YEARS:]
        named = intervals(text, now, years.tolist())
        return [(microseconds(time_to_text(a)), microseconds(time_to_text(b))) for a, b in named]

    @staticmethod
    def _pool(
        view: View, query: npt.NDArray[np.float32], k: int, allowed: Bools, raw: Mapping[str, Scores]
    ) -> Ints:
        """Rows whose vectors are looked at where there are too many for all: the nearest, fetched over and
        over again twice as many until enough of them are allowed, the best by words, and their neighbours."""
        passages, wanted = view.passages, max(_POOL, 4 * k)
        size = wanted
        while True:
            near = passages.rows_of(np.sort(view.index.nearest(query, size)))
            if allowed[near].sum() >= min(wanted, allowed.sum()) or size >= len(view.index):
                break
            size *= 2
        words = np.where(allowed, raw["words"] + raw["words_context"], 0)
        best = np.argpartition(-words, min(wanted, len(words) - 1))[:wanted]
        pool = np.concatenate([near, best[words[best] > 0]])
        for rows in (passages.before[pool], passages.after[pool]):
            pool = np.concatenate([pool, rows[rows >= 0]])
        return np.unique(pool)

    def _collect(
        self, principal: Principal, search: Search, k: int, min_score: float | None, filters: Filters
    ) -> list[Candidate]:
        """The `k` best that the store still shows the caller, no source more often than asked."""
        words_only = self._embedder is None
        for first in (8 * k, None):  # the best of many are found faster than the order of all
            order = search.order(min_score, matching_only=words_only, first=first)
            found = self._shown(principal, search, order, k, filters)
            if len(found) == k or len(order) == search.allowed.sum():
                break
        return found

    def _shown(
        self, principal: Principal, search: Search, order: Ints, k: int, filters: Filters
    ) -> list[Candidate]:
        passages = search.view.passages
        found: list[Candidate] = []
        taken: dict[int, int] = {}
        for start in range(0, len(order), k):
            rows = order[start : start + k]
            ids = [passages.ids[row].decode() for row in rows]
            cubes = self._store.found(principal, ids, filters.states)
            for row, cube_id, score in zip(rows, ids, search.scores(rows), strict=True):
                source = int(passages.source[row])
                full = filters.per_source is not None and taken.get(source, 0) >= filters.per_source
                if cube_id not in cubes or full:
                    continue
                if source >= 0:
                    taken[source] = taken.get(source, 0) + 1
                found.append(Candidate(cubes[cube_id], score, float(search.ranking.relevance[row])))
                if len(found) == k:
                    return found
        return found

    def _embed(self, texts: list[str]) -> npt.NDArray[np.float32]:
        assert self._embedder is not None
        matrix = self._embedder.embed(texts)
        if matrix.shape != (len(texts), self._embedder.dim):
            raise MemoryInputError(
                f"embedder {self._embedder.model_id!r} gave shape {matrix.shape} for {len(texts)} texts "
                f"instead of {(len(texts), self._embedder.dim)}; use one that gives a row for each text."
            )
        return matrix

    def _embed_missing(self, principal: Principal) -> None:
        model_id = self._model_id
        previous: list[str] = []
        while cubes := self._store.without_vector(principal, model_id, BATCH):
            ids = [cube.id for cube in cubes]
            if ids == previous:
                raise IntegrityError(
                    f"embeddings of {model_id!r} do not stay in the store; please report this."
                )
            previous = ids
            self._store.put_vectors(
                principal, model_id, cubes, self._embed([cube.body or "" for cube in cubes])
            )
