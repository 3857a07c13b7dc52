"""Nearest neighbours among many: an hnswlib graph that is never changed, and beside it what is newer.

A graph is built apart, saved, and swapped in whole: hnswlib can neither add and search at once nor forget.
What came or changed since then is the tail, searched exactly; what went is passed over.
"""

from __future__ import annotations

import importlib
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from memos_engine.memory.index import Floats, Indices
from memos_engine.memory.vectors import ExactVectors

M, EF_CONSTRUCTION = 16, 100


@dataclass(frozen=True, slots=True)
class IndexLimits:
    """`exact`: up to so many vectors are scanned whole. `tail`, `dead`: share of a graph's vectors that may
    be newer than it, or gone, before it is built anew."""

    exact: int = 20_000
    tail: float = 0.1
    dead: float = 0.25


def library() -> Any:
    """hnswlib, or None where it is not installed (extra `hnsw`)."""
    try:
        return importlib.import_module("hnswlib")
    except ImportError:
        return None


def build(keys: Indices, matrix: Floats) -> Any:
    """A graph over `matrix [n, dim]`, in one thread, so that the same input gives the same graph."""
    graph = library().Index(space="ip", dim=matrix.shape[1])
    graph.init_index(max_elements=max(1, len(keys)), M=M, ef_construction=EF_CONSTRUCTION, random_seed=100)
    if len(keys):
        graph.add_items(matrix, keys, num_threads=1)
    return graph


def load(path: str, dim: int, count: int) -> Any | None:
    """A saved graph, whose file must have been verified; None if it is not what it should be."""
    graph = library().Index(space="ip", dim=dim)
    try:
        graph.load_index(path, max_elements=max(1, count))
    except RuntimeError:
        return None
    return graph if graph.get_current_count() == count and graph.dim == dim else None


class HnswVectors:
    """A `VectorIndex` of a graph and a tail."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph
        self._lock = threading.Lock()
        self._held: Indices = np.sort(np.array(graph.get_ids_list(), np.int64))
        self._dead = np.zeros(len(self._held), bool)
        self.tail = ExactVectors()

    def __len__(self) -> int:
        return int((~self._dead).sum()) + len(self.tail)

    @property
    def keys(self) -> Indices:
        """All keys that are held, ascending."""
        return np.union1d(self._held[~self._dead], self.tail.matrix[0])

    def worn(self, limits: IndexLimits) -> bool:
        """Whether so much is new or gone that a new graph is due."""
        size = max(1, len(self._held))
        return len(self.tail) > limits.tail * size + 100 or self._dead.sum() > limits.dead * size

    def put(self, keys: Indices, matrix: Floats) -> None:
        self._bury(keys)
        self.tail.put(keys, matrix)

    def drop(self, keys: Indices) -> None:
        self._bury(keys)
        self.tail.drop(keys)

    def nearest(self, query: Floats, k: int) -> Indices:
        size = len(self._held)
        tail = self.tail.nearest(query, k)
        if not size:
            return tail
        k = min(size, k + min(int(self._dead.sum()), k))
        with self._lock:
            self._graph.set_ef(max(100, 2 * k))
            labels, _ = self._graph.knn_query(query[None].astype(np.float32), k=k, num_threads=1)
        found = labels[0].astype(np.int64)
        alive = found[~self._dead[np.searchsorted(self._held, found)]]
        return np.concatenate([alive, tail])

    def vectors(self, keys: Indices) -> Floats:
        out = np.zeros((len(keys), self._graph.dim), np.float32)
        if len(self.tail):
            out = self.tail.vectors(keys)
        at = np.minimum(np.searchsorted(self._held, keys), max(0, len(self._held) - 1))
        if not len(self._held):
            return out
        rows = np.flatnonzero((self._held[at] == keys) & ~self._dead[at])
        if len(rows):
            with self._lock:
                out[rows] = self._graph.get_items(keys[rows], return_type="numpy")
        return out

    def _bury(self, keys: Indices) -> None:
        self._dead |= np.isin(self._held, keys)
