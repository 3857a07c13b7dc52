"""MemoryPathResolver: from a question to topics, the concepts in them, and the facts in order (the paper's
topic - concept - fact paths, arXiv 2507.03724, section 5.4).

A topic is a tag, a concept a name that memories share, a fact a memory. Nothing is stored: the graph is read
off the memories that the caller may see, so that it is never stale and never shows what is not theirs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from memos_engine.errors import MemoryInputError
from memos_engine.memory.cube import MemCube
from memos_engine.memory.fact import folded
from memos_engine.memory.governance import Principal
from memos_engine.memory.operator import MemOperator
from memos_engine.memory.slots import entities_of
from memos_engine.memory.store import MemoryStore

FIRST = 8
"""Memories that a question finds, whose tags and names the paths go through."""
_FOLLOWED = ("derived_from", "merged_from", "supersedes", "mentions", "contradicts")


@dataclass(frozen=True)
class MemoryPath:
    """One way from a topic (None: untagged) over a concept to its facts, by since when they hold.

    `edges` are derivations and mentions between these facts: `(from, kind, to)`, ids.
    """

    topic: str | None
    concept: str
    facts: tuple[MemCube, ...]
    edges: tuple[tuple[str, str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        facts = [{"id": cube.id, "text": cube.body} for cube in self.facts]
        return {
            "topic": self.topic,
            "concept": self.concept,
            "facts": facts,
            "edges": [list(edge) for edge in self.edges],
        }


class MemoryPathResolver:
    """Paths through what a caller may see."""

    def __init__(self, store: MemoryStore, operator: MemOperator) -> None:
        self._store, self._operator = store, operator

    def resolve(self, principal: Principal, text: str, *, most: int = 8, facts: int = 16) -> list[MemoryPath]:
        """At most `most` paths for a question, those through more of the best hits first; ties by concept.

        Each has at most `facts` facts, the best by relevance to its concept. Raises `MemoryInputError`.
        """
        if most < 1 or facts < 1:
            raise MemoryInputError("most and facts must be at least 1.")
        hits = [hit.cube for hit in self._operator.recall(principal, text, k=FIRST)]
        weight: dict[str, float] = defaultdict(float)
        shown: dict[str, str] = {}
        asked = {folded(name) for name in entities_of(text)}
        for place, cube in enumerate(hits):
            for name in dict.fromkeys(entities_of(cube.body or "")):
                key = folded(name)
                weight[key] += 1 / (1 + place) + (1.0 if key in asked else 0.0)
                shown.setdefault(key, name)
        paths: list[tuple[float, MemoryPath]] = []
        for key in sorted(weight, key=lambda one: (-weight[one], one)):
            paths += [(weight[key], path) for path in self._through(principal, shown[key], facts)]
            if len(paths) >= most:
                break
        return [path for _, path in paths[:most]]

    def _through(self, principal: Principal, concept: str, facts: int) -> list[MemoryPath]:
        """The paths over one concept, one for each topic."""
        key = folded(concept)
        near = self._operator.recall(principal, concept, k=facts)
        holding = [hit.cube for hit in near if key in folded(hit.cube.body or "")]
        by_topic: dict[str | None, list[MemCube]] = defaultdict(list)
        for cube in holding:
            for topic in cube.tags or (None,):
                by_topic[topic].append(cube)
        return [
            MemoryPath(topic, concept, tuple(sorted(found, key=_since)), self._edges(principal, found))
            for topic, found in sorted(by_topic.items(), key=lambda item: (-len(item[1]), item[0] or ""))
        ]

    def _edges(self, principal: Principal, cubes: Iterable[MemCube]) -> tuple[tuple[str, str, str], ...]:
        ids = {cube.id for cube in cubes}
        found = {
            (edge.source, edge.kind, edge.target)
            for one in sorted(ids)
            for edge in self._store.lineage(principal, one)
            if edge.kind in _FOLLOWED and edge.source in ids and edge.target in ids
        }
        return tuple(sorted(found))


def _since(cube: MemCube) -> tuple[str, str]:
    starts = cube.fact.valid_from if cube.fact is not None and cube.fact.valid_from else cube.created_at
    return starts.isoformat(), cube.id
