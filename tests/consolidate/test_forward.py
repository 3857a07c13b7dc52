"""The forward that is trained is the decoder's, and so are its adapted outcomes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from memos_engine import MemoryEngine
from memos_engine.consolidate.forward import TopLayers
from memos_engine.consolidate.run import Speaker, merged_decoder
from memos_engine.decoder.adapter import LowRank
from memos_engine.decoder.adapter_record import made, projection_shapes
from memos_engine.decoder.sequence import TextSpan
from memos_engine.errors import UnsupportedModelError


def logits_of(engine: MemoryEngine, decoder: object, ids: tuple[int, ...]) -> torch.Tensor:
    """The decoder's logits behind the base model's anchor, of the last token."""
    speaker = Speaker(engine, decoder)  # type: ignore[arg-type]
    sequence = speaker.decoder.add_request([*speaker._head, TextSpan(ids)], sampled=False)
    while sequence.logits is None:
        speaker.decoder.step()
    found = sequence.logits.clone()
    speaker.decoder.abort(sequence)
    return found


@pytest.mark.parametrize("first", [0, 1, 2])
def test_it_is_the_decoders_forward(engine: MemoryEngine, first: int) -> None:
    spec = engine.decoder.spec
    top = TopLayers(engine.decoder, engine.layout.anchor, first)
    shapes, generator = projection_shapes(spec), torch.Generator().manual_seed(0)
    modules = {}
    for layer in range(first, spec.num_layers):
        for name in ("gate", "up", "down"):
            out, width = shapes[name]
            a, b = torch.randn(2, width, generator=generator), torch.randn(out, 2, generator=generator)
            modules[layer, name] = LowRank(a, b * 0.05, 1.5)
    adapter = made(modules)
    ids = engine.layout.query("Where is the dog?")
    short = engine.layout.query("Hm?")
    padded = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(ids), torch.tensor(short)], batch_first=True
    )  # what stands behind a row changes nothing of it
    features = top.features(padded)
    for deltas, decoder in (({}, engine.decoder), (adapter.modules, merged_decoder(engine.decoder, adapter))):
        hidden = top.hidden(features, deltas)
        for row, one in enumerate((ids, short)):
            got = top.logits(hidden[row, len(one) - 1])
            expected = logits_of(engine, decoder, one)
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits_of(engine, engine.decoder, ids), expected)


def test_gradients_reach_every_matrix(engine: MemoryEngine) -> None:
    top = TopLayers(engine.decoder, engine.layout.anchor, 1)
    a, b = torch.randn(2, 80, requires_grad=True), torch.randn(48, 2, requires_grad=True)
    hidden = top.hidden(top.features(torch.tensor([[5, 6, 7]])), {(1, "down"): LowRank(a, b, 1.0)})
    top.logits(hidden).logsumexp(-1).sum().backward()
    for tensor in (a, b):
        assert tensor.grad is not None
        assert float(tensor.grad.abs().sum()) > 0


def test_what_it_cannot_do_is_refused_by_name(engine: MemoryEngine) -> None:
    layer = engine.decoder.spec.layers[0]
    for changes, why in (
        ({"sandwich_norms": True}, "norms behind"),
        ({"embed_scale": 2.0}, "scaled embedding"),
        ({"layers": (replace(layer, window=8),) * 3}, "sliding windows"),
        ({"layers": (replace(layer, rope=None),) * 3}, "without RoPE"),
    ):
        engine.decoder.spec, before = replace(engine.decoder.spec, **changes), engine.decoder.spec
        with pytest.raises(UnsupportedModelError, match=why):
            TopLayers(engine.decoder, (), 1)
        engine.decoder.spec = before
