"""How an adapter is trained; defaults are those that did best in this project's experiments on a 135M
model."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from memos_engine.errors import MemoryInputError


@dataclass(frozen=True)
class Recipe:
    """rank and alpha of gate, up and down in the top `share` of the layers (those below are computed once for
    all steps, and their KV stays the base model's). Each step takes so many facts, swaps, own answers,
    mentions and ordinary prompts; cross-entropy on the facts, KL to the base model on the rest, with these
    weights. AdamW, a short warm-up, a cosine to a tenth. Raises MemoryInputError."""

    rank: int = 16
    alpha: float = 32.0
    share: float = 1 / 3
    steps: int = 48
    warmup: int = 3
    lr: float = 4e-3
    clip: float = 1.0
    facts: int = 16
    swaps: int = 3
    own: int = 1
    mentions: int = 8
    replay: int = 5
    replay_weight: float = 3.0
    answer_tokens: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (self.rank, self.steps, self.facts, self.answer_tokens)
        if not all(type(n) is int and 1 <= n <= 4096 for n in counts):
            raise MemoryInputError("rank, steps, facts and answer_tokens are integers of 1 to 4096.")
        if not (0 < self.share <= 1 and 0 < self.lr < 1 and 0 < self.alpha <= 4096 and self.clip > 0):
            raise MemoryInputError(
                "share is above 0 and at most 1, lr between 0 and 1, alpha and clip above 0."
            )

    def first(self, layers: int) -> int:
        """The lowest layer that is adapted."""
        return layers - max(1, round(layers * self.share))

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        if step < self.warmup:
            return self.lr * (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return asdict(self)
