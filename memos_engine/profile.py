"""What splicing costs one model in quality, as `bench quality --profile` measured it; kept beside the models.

A profile belongs to weights (in a compute dtype), tokenizer and template: another of these has another.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from memos_engine.errors import MemoryInputError
from memos_engine.models.cache import cache_dir

log = logging.getLogger("memos_engine")

VERSION = 1


@dataclass(frozen=True)
class ProfilePoint:
    """Means over n prompts: KL divergence from full prefill (nats), agreement of greedy tokens, word F1."""

    memories: int
    recompute: float
    kl_mean: float
    top1: float
    answer_f1: float
    n: int


@dataclass(frozen=True)
class SplicingProfile:
    """points: the curve. systematic_k, systematic_v: shares of what neighbours do to K and V that are the
    same whoever they are, the part that an average can store, where they were measured. dataset: what the
    prompts came from."""

    points: tuple[ProfilePoint, ...]
    systematic_k: float | None
    systematic_v: float | None
    dataset: str
    version: int = VERSION

    def kl(self, recompute: float, memories: int) -> float:
        """Expected KL divergence, between the points by straight lines, beyond them as at the nearest.

        Raises MemoryInputError where the profile has no point.
        """
        counts = sorted({point.memories for point in self.points})
        if not counts:
            raise MemoryInputError("The profile has no points; run: memos-engine bench quality --profile")
        curves = [(float(count), self._at(count, recompute)) for count in counts]
        return _between(curves, float(memories))

    def _at(self, memories: int, recompute: float) -> float:
        curve = sorted((p.recompute, p.kl_mean) for p in self.points if p.memories == memories)
        return _between(curve, recompute)


def _between(curve: Sequence[tuple[float, float]], x: float) -> float:
    if x <= curve[0][0]:
        return curve[0][1]
    for (left, low), (right, high) in pairwise(curve):
        if x <= right:
            return low + (high - low) * (x - left) / (right - left)
    return curve[-1][1]


def profile_path(weights: str, layout: str) -> Path:
    """Where the profile of these digests is kept."""
    return cache_dir().parent / "profiles" / f"{weights[:32]}-{layout[:32]}.json"


def save_profile(profile: SplicingProfile, weights: str, layout: str) -> Path:
    """Writes the profile whole or not at all."""
    path = profile_path(weights, layout)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(asdict(profile), indent=1))
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def load_profile(weights: str, layout: str) -> SplicingProfile | None:
    """The profile of these digests; None where there is none, or none that can be read (which is logged)."""
    path = profile_path(weights, layout)
    try:
        found = json.loads(path.read_text())
        points = tuple(ProfilePoint(**point) for point in found.pop("points"))
        profile = SplicingProfile(points=points, **found)
        shares = (profile.systematic_k, profile.systematic_v)
        numbers = [*(share for share in shares if share is not None), *(p.kl_mean for p in points)]
        if profile.version != VERSION or not all(math.isfinite(number) for number in numbers):
            raise ValueError(f"version {profile.version}, or numbers that are none")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("memos_engine: the splicing profile %s cannot be read: %s", path, error)
        return None
    return profile
