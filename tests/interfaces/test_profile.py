"""The splicing profile: read back as written, between its points, and never believed when damaged."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from memos_engine.errors import MemoryInputError
from memos_engine.profile import ProfilePoint, SplicingProfile, load_profile, profile_path, save_profile

POINTS = tuple(
    ProfilePoint(memories, share, kl, 0.97, 0.3, 20)
    for memories, share, kl in [(3, 0.0, 0.01), (3, 0.4, 0.002), (8, 0.0, 0.03), (8, 0.4, 0.006)]
)
PROFILE = SplicingProfile(POINTS, 0.7, 0.6, "invented")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMOS_ENGINE_CACHE", str(tmp_path / "cache"))


def test_there_and_back():
    assert load_profile("w" * 64, "l" * 64) is None
    path = save_profile(PROFILE, "w" * 64, "l" * 64)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert load_profile("w" * 64, "l" * 64) == PROFILE
    assert load_profile("x" * 64, "l" * 64) is None


@pytest.mark.parametrize(
    ("recompute", "memories", "kl"),
    [(0.0, 3, 0.01), (0.2, 3, 0.006), (0.4, 8, 0.006), (1.0, 8, 0.006), (0.0, 1, 0.01), (0.0, 20, 0.03)],
)
def test_between_and_beyond_the_points(recompute, memories, kl):
    assert PROFILE.kl(recompute, memories) == pytest.approx(kl)
    assert PROFILE.kl(0.1, 5) == pytest.approx(0.008 + (0.024 - 0.008) * 2 / 5)


def test_no_points_no_answer():
    with pytest.raises(MemoryInputError, match="--profile"):
        replace(PROFILE, points=()).kl(0.0, 3)


@pytest.mark.parametrize(
    "change", [{"version": 2}, {"points": 3}, {"systematic_k": float("nan")}, {"more": 1}]
)
def test_what_cannot_be_read_counts_as_none(change, caplog):
    path = save_profile(PROFILE, "w", "l")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert load_profile("w", "l") is None
    path.write_text("{")
    assert load_profile("w", "l") is None
    assert "cannot be read" in caplog.text
    assert profile_path("w", "l") == path
