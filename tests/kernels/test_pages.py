"""Memory in huge pages: zeros, aligned, and kept as long as a view of it."""

import gc

import pytest
import torch

from memos_engine.ops.pages import HUGE, huge_zeros


@pytest.mark.parametrize("nbytes", [0, 1, HUGE - 1, HUGE, HUGE + 1, 3 * HUGE + 4096])
def test_as_many_zeros_as_asked_for(nbytes: int) -> None:
    memory = huge_zeros(nbytes)
    assert memory.shape == (nbytes,)
    assert memory.dtype == torch.uint8
    assert not memory.any()
    if nbytes >= HUGE:
        assert memory.data_ptr() % HUGE == 0


def test_a_view_keeps_its_memory() -> None:
    view = huge_zeros(2 * HUGE).view(torch.bfloat16)[-8:]
    gc.collect()
    others = [huge_zeros(2 * HUGE).fill_(7) for _ in range(3)]
    view += 1
    assert view.tolist() == [1.0] * 8
    assert len(others) == 3
