"""Logits to token. The order of the filters and the draw are transformers', so equal seeds agree with it."""

from __future__ import annotations

import math

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
        token = self.checked(float(best.values), int(best.indices))
        if self.params.greedy:
            return token
        probs = torch.softmax(self.filtered(logits), dim=-1)
        return int(torch.multinomial(probs, 1, generator=self.generator))

    @staticmethod
    def checked(value: float, token: int) -> int:
        """The token of the highest logit `value`; max() passes NaN on, so that one look is enough."""
        if not math.isfinite(value):
            raise ModelError("The model's logits are not finite. Check its weights and dtype.")
        return token

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


def sample(samplers: list[Sampler], logits: Tensor, rows: list[int]) -> list[int | Exception]:
    """A token for each sampler from its row of logits `[n, vocab] float32`; an error stays with its row.

    All greedy rows are decided together, with one transfer from the device.
    """
    greedy = [i for i, sampler in enumerate(samplers) if sampler.params.greedy]
    all_rows = len(greedy) == logits.shape[0]
    best = (logits if all_rows else logits[[rows[i] for i in greedy]]).max(dim=-1) if greedy else None
    found: dict[int, tuple[float, int]] = {}
    if best is not None:
        found = dict(zip(greedy, zip(best.values.tolist(), best.indices.tolist(), strict=True), strict=True))
    out: list[int | Exception] = []
    for i, sampler in enumerate(samplers):
        try:
            if i in found:
                out.append(sampler.checked(*found[i]))
            else:
                out.append(sampler(logits[rows[i]]))
        except Exception as error:
            out.append(error)
    return out
