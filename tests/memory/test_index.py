from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from memos_engine.errors import MemoryInputError
from memos_engine.memory.index import ExactIndex

INDEX = ExactIndex()
floats = st.floats(-1, 1, width=32)


@given(st.data(), st.integers(0, 40), st.integers(1, 9), st.integers(1, 50))
def test_it_agrees_with_float64(data: st.DataObject, n: int, dim: int, k: int) -> None:
    matrix = data.draw(hnp.arrays(np.float32, (n, dim), elements=floats)).astype(np.float64)
    query = data.draw(hnp.arrays(np.float32, (dim,), elements=floats))
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    matrix = np.where(norms > 1e-6, matrix / np.where(norms > 0, norms, 1), 0)
    length = np.linalg.norm(query.astype(np.float64))
    truth = matrix @ (query / length if length > 0 else query)
    rows, scores = INDEX.search(query, matrix.astype(np.float32), k)
    assert rows.dtype == np.int64
    assert scores.dtype == np.float32
    assert len(rows) == len(scores) == min(k, n) == len(set(rows))
    np.testing.assert_allclose(scores, truth[rows], atol=3e-6)
    assert all(a >= b for a, b in pairwise(scores))
    left_out = np.delete(truth, rows)
    if len(left_out) and len(rows):
        assert left_out.max() <= scores[-1] + 3e-6


def test_ties_go_by_row() -> None:
    matrix = np.tile(np.float32([0.6, 0.8]), (5000, 1))
    matrix[::3] = np.float32([0.8, 0.6])
    rows, _ = INDEX.search(np.float32([3, 4]), matrix, 5000)
    assert rows.tolist() == sorted(range(5000), key=lambda row: (row % 3 == 0, row))


def test_a_zero_query_finds_something_and_no_nan() -> None:
    rows, scores = INDEX.search(np.zeros(3, np.float32), np.eye(3, dtype=np.float32), 2)
    assert rows.tolist() == [0, 1]
    assert scores.tolist() == [0, 0]


def test_a_subnormal_query_has_a_direction() -> None:
    _, scores = INDEX.search(np.float32([1e-45, 1e-45]), np.float32([[0.6, 0.8]]), 1)
    assert scores.tolist() == pytest.approx([1.4 / 2**0.5], abs=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_are_refused(bad: float) -> None:
    matrix = np.eye(3, dtype=np.float32)
    with pytest.raises(MemoryInputError):
        INDEX.search(np.float32([0, bad, 0]), matrix, 1)
    matrix[2, 1] = bad
    with pytest.raises(MemoryInputError):
        INDEX.search(np.float32([1, 0, 0]), matrix, 1)


@pytest.mark.parametrize(
    ("query", "shape", "k"), [((3,), (2, 4), 1), ((3, 1), (2, 3), 1), ((3,), (3,), 1), ((3,), (2, 3), 0)]
)
def test_wrong_shapes_are_refused(query: tuple[int, ...], shape: tuple[int, ...], k: int) -> None:
    with pytest.raises(MemoryInputError):
        INDEX.search(np.ones(query, np.float32), np.ones(shape, np.float32), k)


def test_an_empty_matrix_gives_nothing() -> None:
    rows, scores = INDEX.search(np.ones(3, np.float32), np.zeros((0, 0), np.float32), 5)
    assert len(rows) == len(scores) == 0
