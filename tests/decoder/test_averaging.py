"""Context-averaged KV against its definition in float64."""

from __future__ import annotations

import pytest
import torch

from memos_engine.decoder.averaging import encode_averaged
from memos_engine.errors import ContextLengthError


@pytest.fixture
def engine(tiny_llama, make_engine):
    return make_engine(tiny_llama(seed=4), dtype="float32")


def test_one_context_is_its_own_average(engine, random_ids):
    anchor, span, left = random_ids(5, 1), random_ids(12, 2), random_ids(20, 3)
    (made,) = encode_averaged(engine, anchor, [span], [left])
    for mean, single in zip((made.k, made.v), engine.encode_span((*anchor, *left), span), strict=True):
        torch.testing.assert_close(mean, single, rtol=1e-5, atol=1e-5)
    assert not made.sigma_v.any()
    assert not made.rank.any()


def test_means_and_spreads_are_those_of_the_definition(engine, random_ids):
    anchor, span = random_ids(5, 1), random_ids(9, 2)
    contexts = [random_ids(n, seed=n) for n in (7, 30, 16, 2)]
    (made,) = encode_averaged(engine, anchor, [span], contexts)
    each = [engine.encode_span((*anchor, *left), span) for left in contexts]
    k, v = (torch.stack([pair[i] for pair in each]).double() for i in (0, 1))
    torch.testing.assert_close(made.k.double(), k.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(made.v.double(), v.mean(0), rtol=1e-6, atol=1e-6)
    distance = [(t - t.mean(0)).square().sum(-1).mean(0) for t in (k, v)]
    torch.testing.assert_close(made.sigma_v.double(), distance[1].sqrt(), rtol=1e-4, atol=1e-5)
    rank = sum(d / t.mean(0).square().sum(-1) for d, t in zip(distance, (k, v), strict=True)).sum((0, 2))
    torch.testing.assert_close(made.rank.double(), rank, rtol=1e-4, atol=1e-4)
    assert made.sigma_v.shape == made.k.shape[:3]
    assert made.rank.shape == (len(span),)


def test_the_order_of_contexts_changes_nothing(engine, random_ids):
    anchor, span = random_ids(5, 1), random_ids(9, 2)
    contexts = [random_ids(n, seed=n) for n in (7, 30, 16)]
    first, again = (encode_averaged(engine, anchor, [span], c)[0] for c in (contexts, contexts[::-1]))
    for name in ("k", "v"):
        torch.testing.assert_close(getattr(first, name), getattr(again, name), rtol=1e-5, atol=1e-5)
    engine.check_integrity()


def test_contexts_that_cannot_be(engine, random_ids):
    with pytest.raises(ValueError, match="at least one"):
        encode_averaged(engine, (1,), [random_ids(4)], [])
    with pytest.raises(ContextLengthError):
        encode_averaged(engine, (1,), [random_ids(4)], [random_ids(engine.spec.max_positions)])
    engine.check_integrity()
