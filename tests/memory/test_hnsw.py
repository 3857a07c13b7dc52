"""The graph for very many memories: built beside the service, saved with a checksum, checked when loaded."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from memos_engine.memory import hnsw
from memos_engine.memory.filters import Filters
from memos_engine.memory.governance import Principal
from memos_engine.memory.hnsw import HnswVectors, IndexLimits
from memos_engine.memory.index import cosines
from memos_engine.memory.operator import MemOperator
from memos_engine.memory.store import MemoryStore
from memos_engine.memory.vectors import ExactVectors

pytestmark = pytest.mark.skipif(hnsw.library() is None, reason="hnswlib is not installed")
DIM, COUNT = 16, 300
LIMITS = IndexLimits(exact=100)
Open = Callable[..., MemoryStore]


class Random:
    model_id, dim = "random", DIM

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        rows = np.array([np.random.default_rng(list(t.encode())).normal(size=DIM) for t in texts])
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def now(work: Callable[[], None]) -> None:
    work()


def never(work: Callable[[], None]) -> None:
    pass


def filled(store: MemoryStore, user: Principal, count: int = COUNT) -> MemOperator:
    operator = MemOperator(store, Random(), limits=LIMITS, run=now)
    for n in range(count):
        operator.remember(user, f"text {n}", tags=[f"t{n % 50}"], session=f"s{n // 10}")
    operator.recall(user, "text 1")
    return operator


def same_as_exact(operator: MemOperator, store: MemoryStore, user: Principal, texts: Sequence[str]) -> None:
    exact = MemOperator(store, Random())
    for text in texts:
        mine, truth = operator.recall(user, text, k=3), exact.recall(user, text, k=3)
        assert mine[0].cube == truth[0].cube
        assert {c.cube.id: c.score for c in mine}[truth[0].cube.id] == pytest.approx(truth[0].score, abs=3e-6)


def test_the_index_against_a_dictionary() -> None:
    rng = np.random.default_rng(0)
    unit = lambda n: (lambda m: m / np.linalg.norm(m, axis=1, keepdims=True))(  # noqa: E731
        rng.normal(size=(n, DIM)).astype(np.float32)
    )
    truth = dict(zip(range(0, 400, 2), unit(200), strict=True))
    keys = np.array(sorted(truth))
    both = [HnswVectors(hnsw.build(keys, np.stack([truth[k] for k in keys]))), ExactVectors()]
    both[1].put(keys, np.stack([truth[k] for k in keys]))
    for _ in range(40):
        some = rng.choice(500, size=8, replace=False).astype(np.int64)
        if rng.random() < 0.5:
            new = unit(8)
            truth.update(zip(some.tolist(), new, strict=True))
            for index in both:
                index.put(some, new)
        else:
            for key in some.tolist():
                truth.pop(key, None)
            for index in both:
                index.drop(some)
        query = unit(1)[0]
        scores = {key: float(cosines(query, vector[None])[0]) for key, vector in truth.items()}
        best = max(scores, key=lambda key: scores[key])
        for index in both:
            assert len(index) == len(truth)
            assert best in index.nearest(query, 20)
            asked = np.array([best, 999, *sorted(truth)[:5]])
            got = index.vectors(asked)
            assert not got[1].any()
            np.testing.assert_allclose(got[0], truth[best], atol=1e-6)
            np.testing.assert_allclose(got[2], truth[sorted(truth)[0]], atol=1e-6)


def test_it_serves_saves_and_comes_back(reopen: Open, alice: Principal) -> None:
    store = reopen()
    operator = filled(store, alice)
    view = operator.view(alice)
    assert not view.exact
    same_as_exact(operator, store, alice, [f"text {n}" for n in range(0, COUNT, 17)])
    assert [p.suffix for p in sorted(store.snapshots.directory.iterdir())] in (
        [".hnsw", ".json"],
        [".json", ".hnsw"],
    )
    new = operator.remember(alice, "a new one")
    store.archive(alice, operator.recall(alice, "text 5", k=1)[0].cube.id)
    store.close()

    store = reopen()
    again = MemOperator(store, Random(), limits=LIMITS, run=never)
    assert again.recall(alice, "a new one", k=1)[0].cube == new
    index = again.view(alice).index
    assert isinstance(index, HnswVectors)
    assert 1 <= len(index.tail) < 40  # what came since the snapshot, not all
    same_as_exact(again, store, alice, ["text 5", "text 7", "a new one"])


def test_filters_are_filled_by_fetching_more(reopen: Open, alice: Principal) -> None:
    store = reopen()
    operator = filled(store, alice)
    rare = operator.recall(alice, "nothing like it", k=10, filters=Filters(tags_all=("t7",)))
    assert len(rare) == COUNT // 50
    exact = MemOperator(store, Random()).recall(
        alice, "nothing like it", k=10, filters=Filters(tags_all=("t7",))
    )
    assert {c.cube.id: c.score for c in rare} == pytest.approx({c.cube.id: c.score for c in exact}, abs=3e-6)


@pytest.mark.parametrize("kind", ["flip", "cut", "empty", "gone", "header", "other"])
def test_a_damaged_snapshot_is_never_used(reopen: Open, alice: Principal, kind: str) -> None:
    store = reopen()
    filled(store, alice)
    body = next(store.snapshots.directory.glob("*.hnsw"))
    header = next(store.snapshots.directory.glob("*.json"))
    store.close()
    data, said, rng = body.read_bytes(), header.read_bytes(), random.Random(kind)
    for _ in range(8):
        broken, text = bytearray(data), bytearray(said)
        match kind:
            case "flip":
                broken[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case "cut":
                del broken[rng.randrange(len(data)) :]
            case "empty":
                broken.clear()
            case "header":
                text[rng.randrange(len(text) - 1)] ^= 1
            case "other":
                text = text.replace(b'"count": 300', b'"count": 299')
        assert kind == "gone" or (broken, text) != (data, said)
        body.write_bytes(broken)
        header.write_bytes(text)
        if kind == "gone":
            body.unlink()
        store = reopen()
        operator = MemOperator(store, Random(), limits=LIMITS, run=never)
        operator.recall(alice, "text 3")
        assert operator.view(alice).exact  # the graph was refused, everything is looked at meanwhile
        same_as_exact(operator, store, alice, ["text 3", "text 250"])
        store.close()
    store = reopen()
    operator = MemOperator(store, Random(), limits=LIMITS, run=now)
    operator.recall(alice, "text 3")
    assert not operator.view(alice).exact  # built anew
    same_as_exact(operator, store, alice, ["text 3", "text 250"])
    store.close()
    body.write_bytes(data)  # what was whole at first would have been taken
    header.write_bytes(said)
    operator = MemOperator(reopen(), Random(), limits=LIMITS, run=never)
    operator.recall(alice, "text 3")
    assert not operator.view(alice).exact


def test_an_erasure_takes_the_snapshots_along(reopen: Open, alice: Principal) -> None:
    store = reopen()
    operator = filled(store, alice)
    victim = operator.recall(alice, "text 42", k=1)[0].cube
    vector = Random().embed([victim.body or ""])[0].tobytes()

    def everything() -> bytes:
        return b"".join(p.read_bytes() for p in store.directory.rglob("*") if p.is_file())

    assert vector in everything()
    store.erase(alice, victim.id)
    assert vector not in everything()
    assert victim.id not in {c.cube.id for c in operator.recall(alice, "text 42", k=5)}
    store.close()
    store = reopen()
    MemOperator(store, Random(), limits=LIMITS, run=now).recall(alice, "text 1")
    assert vector not in everything()


def test_an_index_built_before_an_erasure_is_not_kept(reopen: Open, alice: Principal) -> None:
    store = reopen()
    waiting: list[Callable[[], None]] = []
    filler = MemOperator(store, Random(), limits=LIMITS, run=never)
    cubes = [filler.remember(alice, f"text {n}") for n in range(150)]
    operator = MemOperator(store, Random(), limits=LIMITS, run=waiting.append)
    operator.recall(alice, "text 1")
    store.erase(alice, cubes[3].id)
    waiting.pop()()
    assert list(store.snapshots.directory.iterdir()) == []
    assert cubes[3].id not in {c.cube.id for c in operator.recall(alice, "text 3", k=150)}


def test_a_worn_graph_is_built_anew(reopen: Open, alice: Principal) -> None:
    store = reopen()
    operator = filled(store, alice)
    first = operator.view(alice).index
    for n in range(140):
        operator.remember(alice, f"more {n}")
    operator.recall(alice, "more 7")
    second = operator.view(alice).index
    assert second is not first
    assert len(second) == COUNT + 140
    assert len(list(store.snapshots.directory.glob("*.hnsw"))) == 1
    same_as_exact(operator, store, alice, ["more 7", "text 9"])


def test_without_the_library_everything_is_exact(
    reopen: Open, alice: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hnsw, "library", lambda: None)
    store = reopen()
    operator = filled(store, alice, 120)
    assert operator.view(alice).exact
    assert list(store.snapshots.directory.iterdir()) == []


def test_files_that_are_not_ours_stay(reopen: Open, alice: Principal) -> None:
    store = reopen()
    note = Path(store.snapshots.directory) / "README"
    note.write_text("mine")
    cube = store.add(alice, "x")
    store.erase(alice, cube.id)
    assert note.read_text() == "mine"
