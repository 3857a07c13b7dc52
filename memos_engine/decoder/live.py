"""Watches the parameters of a live model, so that nothing computed with old weights is used with new ones."""

from __future__ import annotations

from typing import Any

import torch

from memos_engine.decoder.engine import DecoderEngine
from memos_engine.decoder.weights import Weights
from memos_engine.errors import ModelError


class LiveWeights:
    """A live model whose parameters an engine shares.

    Per call it compares each parameter's identity, address and version counter, and three of its elements:
    writes through `.data` (as adapters are merged) change no counter.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._seen = self._fingerprint()

    def refresh(self, decoder: DecoderEngine) -> bool:
        """Takes changed parameters over and forgets pages made with the old ones; True if there were any.

        Raises ModelError when dtype or device changed.
        """
        now = self._fingerprint()
        if now == self._seen:
            return False
        weights = Weights.from_model(self.model, decoder.spec)
        if weights.dtype != decoder.runner.cache.k.dtype or weights.device != decoder.runner.device:
            raise ModelError("The model's dtype or device changed after attach(); call attach() again.")
        decoder.use_weights(weights)
        self._seen = now
        return True

    def _fingerprint(self) -> tuple[list[tuple[int, int, int]], bytes]:
        parameters = list(self.model.parameters())
        places = [(id(p), p.data_ptr(), p._version) for p in parameters]
        flat = [p.detach().view(-1) for p in parameters if p.is_contiguous() and p.numel()]
        samples = [f.as_strided((3,), ((f.numel() - 1) // 2,)) for f in flat]
        content = torch.cat(samples).float().cpu().numpy().tobytes() if samples else b""
        return places, content
