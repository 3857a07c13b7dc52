"""Logits to token. The order of the filters and the draw are transformers', so equal seeds agree with it."""

from __future__ import annotations

import torch
from torch import Tensor

from memos_engine.config import SamplingParams
from memos_engine.errors import ModelError


class Sampler:
    """Chooses tokens for one request; holds its random generator.

    Without a seed the draw uses torch's global generator, as `generate()` in transformers does.
    """

    def __init__(self, params: SamplingParams, device: torch.device | str = "cpu") -> None:
        self.params = params
        self.generator: torch.Generator | None = None
        if params.seed is not None:
            self.generator = torch.Generator(device=device).manual_seed(params.seed)

    def __call__(self, logits: Tensor) -> int:
        """logits `[vocab] float32`; returns a token id. Raises ModelError on NaN: no token is better."""
        best = logits.max(dim=-1)
        if not torch.isfinite(best.values):  # max() passes NaN on
            raise ModelError("The model's logits are not finite. Check its weights and dtype.")
        if self.params.greedy:
            return int(best.indices)
        probs = torch.softmax(self.filtered(logits), dim=-1)
        return int(torch.multinomial(probs, 1, generator=self.generator))

    def filtered(self, logits: Tensor) -> Tensor:
        """Temperature, then top-k, then top-p; excluded tokens get -inf."""
        p = self.params
        scores = logits / p.temperature
        if 0 < p.top_k < scores.numel():
            kth = torch.topk(scores, p.top_k).values[-1]
            scores = scores.masked_fill(scores < kth, float("-inf"))
        if p.top_p < 1:
            ascending, order = torch.sort(scores)
            mass = torch.softmax(ascending, dim=-1).cumsum(dim=-1)
            remove = mass <= 1 - p.top_p
            remove[-1] = False  # the likeliest token always stays
            scores = scores.masked_fill(remove.scatter(0, order, remove), float("-inf"))
        return scores
