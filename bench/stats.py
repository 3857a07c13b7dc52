"""Medians, percentiles and bootstrap intervals; everything a row says about its samples."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def public(self, digits: int = 4) -> dict[str, float]:
        return {
            "value": round(self.value, digits),
            "low": round(self.low, digits),
            "high": round(self.high, digits),
        }


def p95(values: Sequence[float]) -> float:
    """The 95th percentile, linear between neighbours (numpy's default)."""
    return float(np.percentile(np.asarray(values, dtype=np.float64), 95))


def timing(values: Sequence[float], prefix: str, digits: int = 3) -> dict[str, Any]:
    """`{prefix}_p50`, `{prefix}_p95`, `n` and the samples in the order in which they were taken."""
    return {
        f"{prefix}_p50": round(statistics.median(values), digits),
        f"{prefix}_p95": round(p95(values), digits),
        "n": len(values),
        "samples": [round(float(value), digits) for value in values],
    }


def bootstrap(
    values: Sequence[float], statistic: Callable[[np.ndarray], Any] = np.mean, seed: int = 0
) -> Interval:
    """Percentile bootstrap of one sample (Efron 1979). `statistic` takes `[resamples, n]` and an `axis`."""
    return paired_bootstrap([values], lambda a: statistic(a, axis=-1), seed)  # type: ignore[call-arg]


def paired_bootstrap(
    samples: Sequence[Sequence[float]], statistic: Callable[..., Any], seed: int = 0
) -> Interval:
    """Bootstrap of a statistic over several samples that share their rounds: rounds are drawn, all samples
    with them. `statistic(*arrays)` takes arrays `[..., n]` and reduces the last axis."""
    arrays = [np.asarray(sample, dtype=np.float64) for sample in samples]
    n = len(arrays[0])
    if n == 0 or any(len(array) != n for array in arrays):
        raise ValueError("a bootstrap needs samples of one length, at least 1")
    value = float(statistic(*arrays))
    rows = np.random.default_rng(seed).integers(0, n, size=(RESAMPLES, n))
    drawn = np.asarray(statistic(*(array[rows] for array in arrays)))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(value, float(low), float(high))


def ratio(over: Sequence[float], under: Sequence[float], seed: int = 0) -> Interval:
    """Median of the ratios round by round: what the machine does between two rounds cancels."""
    return paired_bootstrap([over, under], lambda a, b: np.median(a / b, axis=-1), seed)


def ratio_of_medians(over: Sequence[float], under: Sequence[float], seed: int = 0) -> Interval:
    """Ratio of two independent samples' medians, each resampled by itself."""
    a, b = (np.asarray(sample, dtype=np.float64) for sample in (over, under))
    rng = np.random.default_rng(seed)
    top = np.median(a[rng.integers(0, len(a), (RESAMPLES, len(a)))], axis=1)
    bottom = np.median(b[rng.integers(0, len(b), (RESAMPLES, len(b)))], axis=1)
    low, high = np.percentile(top / bottom, [2.5, 97.5])
    return Interval(float(np.median(a) / np.median(b)), float(low), float(high))
