"""From retrieval scores to the probability that the answer needs a memory.

A logistic model of what retrieval knows of a candidate. Its coefficients were fitted on one half of LoCoMo's
dialogues and checked on the other (`memos-engine bench need`, docs/scheduling.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

USUAL = 64.0  # tokens of a memory


@dataclass(frozen=True)
class NeedModel:
    """Weights of: a constant, the cosine, the relevance, relevance as a share of the best candidate's, log2
    of the rank (from 1), and log2 of the memory's length in USUAL tokens: a longer one likelier holds it."""

    constant: float
    cosine: float
    relevance: float
    share: float
    rank: float
    length: float

    def __call__(
        self, scores: Sequence[float], relevances: Sequence[float], tokens: Sequence[float]
    ) -> npt.NDArray[np.float64]:
        """Probabilities, one a candidate; candidates are ordered most relevant first."""
        x = features(scores, relevances, tokens)
        z = x @ np.asarray([self.constant, self.cosine, self.relevance, self.share, self.rank, self.length])
        return np.asarray(1 / (1 + np.exp(-np.clip(z, -30, 30))), np.float64)


def features(
    scores: Sequence[float], relevances: Sequence[float], tokens: Sequence[float]
) -> npt.NDArray[np.float64]:
    """`[n, 6]`: what NeedModel weighs."""
    relevance = np.asarray(relevances, np.float64)
    best = max(float(relevance.max(initial=0)), 1e-9)
    ranks = np.log2(np.arange(1, len(relevance) + 1, dtype=np.float64))
    length = np.log2(np.maximum(1.0, np.asarray(tokens, np.float64)) / USUAL)
    score = np.asarray(scores, np.float64)
    columns = [np.ones(len(relevance)), score, relevance, relevance / best, ranks, length]
    return np.stack(columns, axis=1).reshape(len(relevance), 6)


# What a thousand tokens in the window cost of what one needed memory is worth, whatever they say: a decoder
# that reads more answers worse. Fitted on the same half of LoCoMo (docs/scheduling.md).
DISTRACTION = 0.45

DEFAULT_NEED = NeedModel(-6.631, 2.142, 1.066, 4.994, -0.574, 0.271)
