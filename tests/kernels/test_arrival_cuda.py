"""Records that travel to a real device; `test_arrival.py` holds the same logic with stand-ins."""

from __future__ import annotations

import pytest
import torch

from memos_engine.decoder.record import KVRecord

if not torch.cuda.is_available():
    pytest.skip("no CUDA device: copies on a stream are not run here", allow_module_level=True)


def test_each_layer_is_there_once_it_was_waited_for():
    from memos_engine.decoder.arrival import send

    k = torch.randn(12, 4096, 4, 64).pin_memory()
    sigma = torch.rand(12, 4096, 4).pin_memory()
    record = KVRecord(k, (-k).pin_memory(), tuple(range(4096)), "", "", sigma_v=sigma)
    stream = torch.cuda.Stream()
    for _ in range(5):
        moved = send(record, torch.device("cuda"), stream)
        assert torch.equal(moved.sigma_v.cpu(), sigma)
        for layer in range(12):
            moved.arrival.wait(layer)
            assert torch.equal(moved.k[layer].cpu(), k[layer])
            assert torch.equal(moved.v[layer].cpu(), -k[layer])
        torch.cuda.synchronize()
        assert moved.arrival.done
        assert moved.serial == record.serial
