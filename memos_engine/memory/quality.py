"""How good an answer is in expectation: what each memory is needed for, times what its form keeps of it.

`quality = sum over memories of need x quality(form, r)`, less what near-duplicates say twice. need: the
retrieval scores as a calibrated probability (`need.py`). quality(form, r): 1 for text and for KV that is
exact; for spliced KV, how far the answer's distribution stays from full prefill's, as a share of how far it
would be without the memories: `1 - KL(r) / KL_none`, from the model's splicing profile.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

# Measured for SmolLM2-135M (bench quality, docs/splicing.md): memories -> (recompute, KL in nats), and the KL
# of a prompt without its memories. What a model without a profile of its own is taken for, which plans say.
DEFAULT_KL = {
    3: ((0.0, 0.0063), (0.15, 0.0020), (0.4, 0.0003), (1.0, 0.0)),
    8: ((0.0, 0.0082), (0.15, 0.0033), (0.4, 0.0009), (1.0, 0.0)),
}
NONE_KL = 0.45
SAME = 0.3  # share of common three-word runs from which two memories count as saying the same
BINS, EMPTY = 32, np.uint32(0xFFFFFFFF)
UNKNOWN = b"\xff" * (4 * BINS)


@dataclass(frozen=True)
class SpliceQuality:
    """quality(kv, r) of one model. kl: (recompute, memories) to nats. measured: False for the defaults."""

    kl: Callable[[float, int], float]
    none_kl: float = NONE_KL
    measured: bool = True

    def of(self, recompute: float, memories: int) -> float:
        """Between 0 and 1; 1 where everything is computed."""
        return _kept(self.kl, self.none_kl, recompute, max(1, memories))


@lru_cache(maxsize=512)
def _kept(kl: Callable[[float, int], float], none_kl: float, recompute: float, memories: int) -> float:
    """`SpliceQuality.of`, remembered: every plan asks the same, and a curve is slow to read."""
    if recompute >= 1:
        return 1.0
    return min(1.0, max(0.0, 1.0 - kl(recompute, memories) / none_kl))


def default_kl(recompute: float, memories: int) -> float:
    """DEFAULT_KL by straight lines."""
    curves = (np.asarray(DEFAULT_KL[count]) for count in (3, 8))
    few, many = (float(np.interp(recompute, curve[:, 0], curve[:, 1])) for curve in curves)
    return float(np.interp(memories, (3, 8), (few, many)))


DEFAULT_QUALITY = SpliceQuality(default_kl, measured=False)


def sketch(text: str) -> bytes:
    """What tells texts that say the same: a one-permutation MinHash (Li, Owen and Zhang, arXiv 1208.1259) of
    the runs of three words, BINS uint32. The same text has the same sketch in every process."""
    words = text.lower().split()
    bins = np.full(BINS, EMPTY, np.uint32)
    if words:
        runs = [" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))]
        hashes = np.fromiter((zlib.crc32(run.encode("utf-8", "surrogatepass")) for run in runs), np.uint32)
        np.minimum.at(bins, hashes % BINS, hashes)
    return bins.tobytes()


def overlaps(sketches: Sequence[bytes]) -> npt.NDArray[np.float64]:
    """`[n, n]`: estimated share of common runs (Jaccard) of each pair; below SAME, on the diagonal, and for
    memories without a sketch nothing."""
    n = len(sketches)
    bins = np.frombuffer(b"".join(one or UNKNOWN for one in sketches), np.uint32).reshape(n, BINS)
    # The same run has the same hash and so the same bin: equal neighbours in a sorted bin share one.
    order = np.argsort(bins.T, axis=1)
    ordered = np.take_along_axis(bins.T, order, axis=1)
    equal = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != EMPTY)
    share = np.zeros((n, n))
    if not equal.any():  # the usual case: nothing is said twice
        return share
    alike = np.zeros(n, np.bool_)
    alike[order[:, 1:][equal]] = alike[order[:, :-1][equal]] = True
    rows = np.flatnonzero(alike)
    some, filled = bins[rows], (bins[rows] != EMPTY).astype(np.float32)
    both = ((some[:, None] == some[None]) & (some != EMPTY)[:, None]).sum(2)
    counts = filled.sum(1)
    either = counts[:, None] + counts[None] - filled @ filled.T
    found = both / np.maximum(1, either)
    found[found < SAME] = 0
    np.fill_diagonal(found, 0)
    share[np.ix_(rows, rows)] = found
    return share
