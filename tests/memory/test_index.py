from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from memos_engine.errors import MemoryInputError
from memos_engine.memory.index import cosines

floats = st.floats(-1, 1, width=32)


@given(st.data(), st.integers(0, 40), st.integers(1, 9))
def test_they_agree_with_float64(data: st.DataObject, n: int, dim: int) -> None:
    matrix = data.draw(hnp.arrays(np.float32, (n, dim), elements=floats)).astype(np.float64)
    query = data.draw(hnp.arrays(np.float32, (dim,), elements=floats))
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    matrix = np.where(norms > 1e-6, matrix / np.where(norms > 0, norms, 1), 0)
    length = np.linalg.norm(query.astype(np.float64))
    truth = matrix @ (query / length if length > 0 else query)
    scores = cosines(query, matrix.astype(np.float32))
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, truth, atol=3e-6)


def test_equal_rows_have_equal_cosines() -> None:
    matrix = np.tile(np.float32([0.6, 0.8]), (5000, 1))
    assert set(cosines(np.float32([3, 4]), matrix).tolist()) == {1.0}


def test_a_zero_query_is_like_nothing() -> None:
    assert cosines(np.zeros(3, np.float32), np.eye(3, dtype=np.float32)).tolist() == [0, 0, 0]


def test_a_subnormal_query_has_a_direction() -> None:
    scores = cosines(np.float32([1e-45, 1e-45]), np.float32([[0.6, 0.8]]))
    assert scores.tolist() == pytest.approx([1.4 / 2**0.5], abs=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_are_refused(bad: float) -> None:
    matrix = np.eye(3, dtype=np.float32)
    with pytest.raises(MemoryInputError):
        cosines(np.float32([0, bad, 0]), matrix)
    matrix[2, 1] = bad
    with pytest.raises(MemoryInputError):
        cosines(np.float32([1, 0, 0]), matrix)


@pytest.mark.parametrize(("query", "shape"), [((3,), (2, 4)), ((3, 1), (2, 3)), ((3,), (3,))])
def test_wrong_shapes_are_refused(query: tuple[int, ...], shape: tuple[int, ...]) -> None:
    with pytest.raises(MemoryInputError):
        cosines(np.ones(query, np.float32), np.ones(shape, np.float32))


def test_an_empty_matrix_gives_nothing() -> None:
    assert len(cosines(np.ones(3, np.float32), np.zeros((0, 0), np.float32))) == 0
