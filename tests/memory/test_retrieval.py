"""Hybrid retrieval against the loops of `retrieval_model`, over random lives of memories."""

from __future__ import annotations

import importlib.util
import random
import tempfile
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memos_engine.errors import MemoryInputError, MemoryNotFoundError
from memos_engine.memory.filters import Filters
from memos_engine.memory.governance import KeyRing, Principal
from memos_engine.memory.lifecycle import LIVE, LifecycleState
from memos_engine.memory.operator import Candidate, MemOperator
from memos_engine.memory.retrieval import RetrievalWeights
from memos_engine.memory.store import MemoryStore

S = LifecycleState


def _sibling(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


model = _sibling("retrieval_model")

USERS = [Principal("t", "a"), Principal("t", "b"), Principal("u", "a")]
START = datetime(2026, 1, 1, tzinfo=timezone.utc)
WORDS = ["dog", "dogs", "biscuit", "car", "cars", "painted", "painting", "Anna", "the", "blue", "2025", "in"]
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=7).map(" ".join)
queries = texts | texts.map(lambda t: f"{t} in May 2025") | st.just("What happened yesterday to the dog?")
TAGS = ["pets", "home", "work"]
some_tags = st.lists(st.sampled_from(TAGS), max_size=2, unique=True).map(tuple)
moments = st.none() | st.integers(-400, 10).map(lambda days: START + timedelta(days=days))
filters = st.builds(
    Filters,
    tags_any=some_tags,
    tags_all=some_tags,
    tags_none=some_tags,
    created_from=st.none() | st.just(START + timedelta(seconds=8)),
    created_to=st.none() | st.just(START + timedelta(seconds=15)),
    valid_from=moments,
    valid_to=moments,
    semantic_types=st.sampled_from([(), ("fact",), ("fact", "plan")]),
    states=st.sampled_from([LIVE, frozenset({S.ARCHIVED}), LIVE | {S.ARCHIVED}]),
)
adds = st.fixed_dictionaries(
    {
        "user": st.sampled_from([*USERS, USERS[0], USERS[0]]),
        "text": texts,
        "session": st.sampled_from(["one", "one", "one", "two", None]),
        "tags": some_tags,
        "semantic_type": st.sampled_from(["fact", "plan"]),
        "ttl": st.sampled_from([None, None, None, 1, 5, 20]),
        "valid_from": moments,
    }
)
moves = st.tuples(st.sampled_from(["archive", "delete", "erase", "restore"]), st.integers(0, 30))


class Letters:
    """Letter counts, about their mean so that cosines have both signs."""

    model_id, dim = "letters", 26

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        rows = np.array([[t.lower().count(chr(97 + i)) for i in range(26)] for t in texts], np.float64)
        rows -= rows.mean(axis=1, keepdims=True)
        return (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)).astype(np.float32)


class World:
    """A store and the model beside it, with a clock that moves a second a look."""

    def __init__(self, folder: str) -> None:
        self.now, self.pace = START, timedelta(seconds=1)
        self.store = MemoryStore.open(
            Path(folder) / "s", keyring=KeyRing(Path(folder) / "k"), clock=self.tick
        )
        self.known: list[Any] = []
        self.operator = MemOperator(self.store, Letters())

    def tick(self) -> datetime:
        self.now += self.pace
        return self.now

    def recall(self, operator: MemOperator, user: Principal, query: str, k: int, wanted: Filters) -> Any:
        """A search while the clock stands still, so that the model can look at the same time."""
        pace, self.pace = self.pace, timedelta(0)
        found = operator.recall(user, query, k=k, filters=wanted)
        self.pace = pace
        return found

    def add(self, one: dict[str, Any]) -> None:
        ttl = None if one["ttl"] is None else self.now + timedelta(seconds=60 * one["ttl"])
        vector = Letters().embed([one["text"]])[0]
        cube = self.store.add(
            one["user"],
            one["text"],
            vector=vector,
            model_id="letters",
            tags=one["tags"],
            semantic_type=one["semantic_type"],
            ttl_at=ttl,
            session=one["session"],
            valid_from=one["valid_from"],
        )
        since = one["valid_from"] or cube.created_at
        fields = (one["session"], one["tags"], one["semantic_type"], ttl)
        self.known.append(model.Known(cube.id, one["user"], one["text"], cube.created_at, since, *fields))

    def move(self, verb: str, number: int) -> None:
        one = self.known[number % len(self.known)]
        legal = {
            "archive": set(LIVE),
            "restore": {S.ARCHIVED},
            "delete": set(S) - {S.EXPIRED},
            "erase": set(S),
        }
        if one.erased or one.state not in legal[verb] or (one.ttl_at and one.ttl_at <= self.now):
            return
        extra = {"rewrite": False} if verb == "erase" else {}
        getattr(self.store, verb)(one.owner, one.id, **extra)
        one.state = {"archive": S.ARCHIVED, "restore": S.ACTIVATED}.get(verb, S.EXPIRED)
        one.erased = verb == "erase"

    def expected(self, user: Principal, query: str, wanted: Filters, dense: bool) -> dict[str, Any]:
        mine = [one for one in self.known if one.owner == user]
        known = list(dict.fromkeys([query, *(one.text for one in mine)]))
        vectors = dict(zip(known, Letters().embed(known).astype(np.float64), strict=True))
        ranked = model.relevance(
            mine, query, wanted, self.now, vectors if dense else None, self.operator.weights
        )
        by_id = {one.id: one for one in mine}
        return {i: v for i, v in ranked.items() if model.passes(by_id[i], wanted)}


def agree(found: list[Candidate], expected: dict[str, Any], dense: bool) -> None:
    if not dense:
        expected = {i: v for i, v in expected.items() if v[0] > 5e-7}
    assert {c.cube.id for c in found} == set(expected)
    for c in found:
        assert (c.relevance, c.score) == pytest.approx(expected[c.cube.id], abs=3e-6)
    keys = [(-c.relevance, -c.score, c.cube.id) for c in found]
    assert keys == sorted(keys)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.one_of(adds, adds, adds, moves), min_size=1, max_size=30),
    st.lists(
        st.tuples(st.sampled_from(USERS), queries, filters, st.integers(0, 500)), min_size=1, max_size=4
    ),
)
def test_it_agrees_with_the_model(steps: list[Any], searches: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = World(folder)
        words = MemOperator(world.store)
        for number, step in enumerate(steps):
            if isinstance(step, dict):
                world.add(step)
            elif world.known:
                world.move(*step)
            if number % 5 == 0:  # caches follow from there
                world.operator.recall(USERS[0], "dog", k=3)
        for user, query, wanted, later in searches:
            world.now += timedelta(seconds=later)
            for operator, dense in ((world.operator, True), (words, False)):
                found = world.recall(operator, user, query, 100, wanted)
                agree(found, world.expected(user, query, wanted, dense), dense)
                assert world.recall(operator, user, query, 2, wanted) == found[:2]
        world.store.close()


@pytest.mark.parametrize("seed", range(6))
def test_it_agrees_with_the_model_over_long_lives(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    world = World(str(tmp_path))
    words = MemOperator(world.store)
    for _ in range(60):
        if rng.random() < 0.75 or not world.known:
            world.add(
                {
                    "user": rng.choice([*USERS, USERS[0], USERS[0], USERS[0]]),
                    "text": " ".join(rng.choices(WORDS, k=rng.randint(1, 12))),
                    "session": rng.choice(["one", "one", "two", None]),
                    "tags": tuple(rng.sample(TAGS, rng.randint(0, 2))),
                    "semantic_type": "fact",
                    "ttl": rng.choice([None, None, None, 1, 3]),
                    "valid_from": rng.choice([None, START - timedelta(days=rng.randint(0, 400))]),
                }
            )
        else:
            world.move(rng.choice(["archive", "archive", "delete", "erase", "restore"]), rng.randint(0, 99))
        if rng.random() < 0.3:
            world.now += timedelta(seconds=rng.randint(0, 40))
            query = " ".join(rng.choices([*WORDS, "May 2025"], k=rng.randint(1, 12)))
            wanted = rng.choice([Filters(), Filters(), Filters(states=LIVE | {S.ARCHIVED})])
            for operator, dense in ((world.operator, True), (words, False)):
                found = world.recall(operator, USERS[0], query, 100, wanted)
                agree(found, world.expected(USERS[0], query, wanted, dense), dense)
    world.store.close()


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(adds, min_size=2, max_size=20), queries)
def test_nothing_of_others_shows_in_scores_or_explanations(rows: list[dict[str, Any]], query: str) -> None:
    """One user's outcome is the same, to the last bit, whether or not the others are there."""
    outcomes = []
    for crowd in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            world = World(folder)
            for row in rows:
                if crowd or row["user"] == USERS[0]:
                    world.add({**row, "ttl": None, "valid_from": row["valid_from"] or START})
            for operator in (world.operator, MemOperator(world.store)):
                found = operator.recall(USERS[0], query, k=50, explain=True)
                order = {c.cube.id: i for i, c in enumerate(found)}
                outcomes.append(
                    [
                        (c.cube.body, c.score, c.relevance, _shown(c.explanation), order[c.cube.id])
                        for c in found
                    ]
                )
            theirs = [one.id for one in world.known if one.owner != USERS[0]]
            for cube_id in theirs[:3]:
                with pytest.raises(MemoryNotFoundError):
                    world.operator.explain(USERS[0], query, cube_id)
            world.store.close()
    assert outcomes[:2] == outcomes[2:]


def _shown(explanation: Any) -> Any:
    return [getattr(explanation, name) for name in explanation.__dataclass_fields__ if name != "cube_id"]


AWKWARD = [
    'a"b', "'", '"', "dog AND", "NEAR(dog, 2)", "dog*", "^dog", "body:dog", "-dog", "(", ")", "dog OR NOT",
    "🐕", "🐕 dog", "כלב dog", "مرحبا", "犬が好き", "\u202edog\u202c", "%", "_", "\\", "{a b} : c", "a\u0301",
    "x" * 5000, "dog " * 5000, ";DROP TABLE cube", "\t", "1e999", "+", "dog\u0000"[:-1], "\ufeff dog",
]  # fmt: skip


@pytest.mark.parametrize("text", [t for t in AWKWARD if t.strip()])
def test_any_text_is_a_query_and_a_memory(tmp_path: Path, text: str) -> None:
    world = World(str(tmp_path))
    user = USERS[0]
    other = world.store.add(user, "my dog likes biscuits")
    mine = world.store.add(user, text, session=text[:200], tags=[text[:100]])
    for operator in (world.operator, MemOperator(world.store)):
        found = {c.cube.id for c in operator.recall(user, text, k=5)}
        assert found <= {other.id, mine.id}
        assert mine.id in found or not operator.query_stems(text)
    world.store.close()


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(min_size=1, max_size=60).filter(lambda t: t.strip() and "\0" not in t))
def test_a_text_finds_itself_by_words(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = World(folder)
        cube = world.store.add(USERS[0], text)
        words = MemOperator(world.store)
        found = words.recall(USERS[0], text)
        assert [c.cube.id for c in found] == ([cube.id] if words.query_stems(text) else [])
        world.store.close()


def test_what_is_gone_lends_its_words_to_nobody(tmp_path: Path) -> None:
    world, user = World(str(tmp_path)), USERS[0]
    words = MemOperator(world.store)
    ids = []
    for verb in ("archive", "delete", "erase"):
        first = world.store.add(user, f"zebra {verb}", session=verb)
        world.store.add(user, "I like them", session=verb)
        ids.append((verb, first.id))
    assert len(words.recall(user, "zebra", k=10)) == 6  # those that follow match by their context
    for verb, cube_id in ids:
        getattr(world.store, verb)(user, cube_id)
    assert words.recall(user, "zebra", k=10) == []
    archived = words.recall(user, "zebra", filters=Filters(states=LIVE | {S.ARCHIVED}))
    assert [c.cube.body for c in archived] == ["zebra archive", "I like them"]


def test_a_named_time_draws_what_lies_in_it(tmp_path: Path) -> None:
    world, user = World(str(tmp_path)), USERS[0]
    words = MemOperator(world.store)
    for year, month in ((2024, 5), (2025, 5), (2025, 8)):
        since = datetime(year, month, 30, tzinfo=timezone.utc)
        world.store.add(user, f"we went camping, {year}/{month}", valid_from=since)
    for query, best in (("camping in May 2025", "2025/5"), ("camping in August", "2025/8")):
        first, second, _ = words.recall(user, query, explain=True)
        assert best in (first.cube.body or "")
        assert first.relevance > second.relevance
        assert first.explanation is not None
        assert first.explanation.dated
    plain = MemOperator(world.store, weights=RetrievalWeights(dated=0))
    assert len({c.relevance for c in plain.recall(user, "camping in August")}) == 1
    world.store.close()


def test_a_source_is_capped_and_a_filter_explained(tmp_path: Path) -> None:
    world, user = World(str(tmp_path)), USERS[0]
    words = MemOperator(world.store)
    for number in range(5):
        world.store.add(user, f"dog {number}", session="burst", tags=["pets"])
    lone = world.store.add(user, "a dog of my own")
    capped = words.recall(user, "dog", k=10, filters=Filters(per_source=2))
    assert len(capped) == 3
    assert lone.id in {c.cube.id for c in capped}
    why = words.explain(user, "dog", lone.id, Filters(tags_all=("pets",), semantic_types=("plan",)))
    assert why.dropped == ("tags_all", "semantic_types")
    assert [term for term, _ in why.terms] == ["dog"]
    world.store.archive(user, lone.id)
    assert words.explain(user, "dog", lone.id).dropped == ("states",)
    with pytest.raises(MemoryNotFoundError):
        words.explain(USERS[1], "dog", lone.id)


@pytest.mark.parametrize(
    "bad",
    [
        {"tags_any": ("",)},
        {"ids": ("no id",)},
        {"per_source": 0},
        {"states": frozenset()},
        {"created_from": datetime(2026, 1, 1)},
        {"semantic_types": ("Not A Label",)},
    ],
)
def test_bad_filters_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(MemoryInputError):
        Filters(**bad)


@pytest.mark.parametrize("bad", [{"dense": -1.0}, {"words": float("nan")}, {"length": 2.0}, {"fading": 1.5}])
def test_bad_weights_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(MemoryInputError):
        RetrievalWeights(**bad)
