"""The canary: a share of requests is run again as full prefill, to see how far splicing is from it.

What is stored says nothing of how a model bears being spliced with what stands around it today. The canary
looks: off the request's path, at the first token's distribution, after whole prompts only.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from memos_engine.config import Recompute
from memos_engine.decoder.engine import DecoderEngine
from memos_engine.decoder.sequence import KVSpan, Span, TextSpan
from memos_engine.errors import ModelError

LOOKED_AT = 16  # latest checks; fewer decide nothing


class Canary:
    """share: of requests to check, 0 to 1; bound: mean KL divergence (nats) over the latest checks beyond
    which splicing is no longer to be trusted."""

    def __init__(self, decoder: DecoderEngine, share: float, bound: float, seed: int | None = None) -> None:
        self.decoder, self.share, self.bound = decoder, share, bound
        self._random = random.Random(seed)
        self.latest: deque[float] = deque(maxlen=LOOKED_AT)

    def wants(self, spans: Sequence[Span]) -> bool:
        """Whether to check this prompt: chance, where memories were spliced into it."""
        spliced = any(isinstance(span, KVSpan) and span.memory for span in spans)
        return spliced and self._random.random() < self.share

    def check(self, spans: Sequence[Span], recompute: Recompute, root: bytes) -> float:
        """KL divergence (nats) of the first token as spliced from that of full prefill; kept in `latest`."""
        whole = TextSpan(tuple(token for span in spans for token in span.token_ids))
        full = torch.log_softmax(self._first([whole], Recompute(), root).double(), dim=-1)
        spliced = torch.log_softmax(self._first(spans, recompute, root).double(), dim=-1)
        found = max(0.0, float((full.exp() * (full - spliced)).sum()))
        self.latest.append(found)
        return found

    @property
    def drift(self) -> str | None:
        """Why splicing is not to be trusted, or None."""
        mean = sum(self.latest) / max(1, len(self.latest))
        if len(self.latest) < LOOKED_AT or mean <= self.bound:
            return None
        return (
            f"the first token was {mean:.3f} nats from full prefill in the last {LOOKED_AT} requests "
            f"that were checked (bound {self.bound:g})"
        )

    def _first(self, spans: Sequence[Span], recompute: Recompute, root: bytes) -> Tensor:
        request = self.decoder.add_request(spans, None, root, sampled=False, recompute=recompute)
        try:
            while request.logits is None:
                if request.finish_reason is not None:
                    raise request.error or ModelError("The canary's request was ended by somebody else.")
                self.decoder.step()
            return request.logits
        finally:
            self.decoder.abort(request)
