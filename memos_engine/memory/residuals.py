"""What predictions get wrong, learnt from what requests really took.

Medians and quantiles of the newest log(actual / predicted), so that one request that the machine forgot about
for seconds changes nothing. Times come from the caller; a clock that jumped gives a negative or a huge time,
and both are left out.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Mapping
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

WINDOW = 64  # newest requests that a stage's factor is the median of
PROMISES = 256  # newest requests whose totals say how far predictions may be off
PRIOR = 8  # measured requests that the calibration's own opinion counts as, less and less over WINDOW
SMALL_MS = 0.05  # below this a time is noise, not a stage
LIMIT = math.log(8)  # a stage's factor stays within an eighth and eight times the table
WILD = math.log(1000)
STALL = math.log(2.5)  # a request that takes so much longer stalled: no plan insures against it ...
STALLS = 0.05  # ... unless so many do
MOST = math.log(3)  # a machine that wavers by more keeps no promise, whatever is left out for it


class Residuals:
    """Factors by stage and the spread of the total. Safe for several threads.

    spread: standard deviation of log(actual / predicted) before anything was measured.
    """

    def __init__(self, spread: float = 0.1) -> None:
        self.spread = spread
        self._stages: dict[str, deque[float]] = {}
        self._totals: deque[float] = deque(maxlen=PROMISES)
        self._lock = threading.Lock()
        self._factors: dict[str, float] | None = None
        self._quantiles: dict[float, float] = {}

    def __len__(self) -> int:
        return len(self._totals)

    def observe(self, table: Mapping[str, float], actual: Mapping[str, float]) -> None:
        """A finished request: what the table alone said of each stage, and what it took, in milliseconds."""
        with self._lock:
            for name, ms in table.items():
                ratio = _log_ratio(actual.get(name, math.nan), ms)
                if ratio is not None:
                    self._stages.setdefault(name, deque(maxlen=WINDOW)).append(ratio)
            self._factors = None

    def promised(self, predicted_ms: float, actual_ms: float) -> None:
        """A finished request's total, against the prediction that was made for it."""
        ratio = _log_ratio(actual_ms, predicted_ms)
        if ratio is not None:
            with self._lock:
                self._totals.append(ratio)
                self._quantiles = {}

    def factors(self) -> dict[str, float]:
        """By stage: what to multiply the table by. Few measurements move it little."""
        with self._lock:
            if self._factors is None:
                self._factors = {name: _factor(ratios) for name, ratios in self._stages.items()}
            return self._factors

    def quantile(self, share: float) -> float:
        """Factor on a predicted total that a `share` of requests stays below: measured, with the
        calibration's normal distribution counting as some further requests while there are few."""
        with self._lock:
            if share not in self._quantiles:
                self._quantiles[share] = math.exp(min(MOST, self._quantile(share)))
            return self._quantiles[share]

    def tail(self, stage: str, share: float) -> float:
        """Factor on a stage's median that a `share` of requests stays below."""
        with self._lock:
            ratios = np.asarray(self._stages.get(stage, ()), np.float64)
        if len(ratios) < 2:
            return 1.5
        return float(math.exp(min(LIMIT, np.quantile(ratios, share) - np.median(ratios))))

    def relax(self, stage: str) -> None:
        """A stage was left out because it would take too long: that is believed a little less each time, or
        it would never be tried again."""
        with self._lock:
            ratios = self._stages.get(stage)
            if ratios:
                ratios.append(0.5 * float(np.median(ratios)))
                self._factors = None

    def _quantile(self, share: float) -> float:
        measured, normal = np.asarray(self._totals, np.float64), self.spread * _NORMAL
        stalled = measured > STALL
        if len(measured) and stalled.sum() <= max(1, STALLS * len(measured)):
            measured = measured[~stalled]
        values = np.concatenate([measured, normal])
        weights = np.ones(len(values))
        weights[len(measured) :] = PRIOR * max(1e-9, 1 - len(measured) / WINDOW) / len(normal)
        order = np.argsort(values)
        reached = np.cumsum(weights[order]) / weights.sum()
        return float(values[order][min(int(np.searchsorted(reached, share)), len(values) - 1)])


def _log_ratio(actual: float, predicted: float) -> float | None:
    if not (math.isfinite(actual) and math.isfinite(predicted)) or min(actual, predicted) < SMALL_MS:
        return None
    ratio = math.log(actual / predicted)
    return ratio if abs(ratio) < WILD else None


def _factor(ratios: deque[float]) -> float:
    trust = len(ratios) / (len(ratios) + 2)
    return math.exp(max(-LIMIT, min(LIMIT, trust * float(np.median(ratios)))))


_NORMAL: npt.NDArray[np.float64] = np.asarray([NormalDist().inv_cdf((i + 0.5) / 64) for i in range(64)])
"""64 evenly likely values of a standard normal."""
