"""Fixtures for every test. Real models are used where they were pulled; no test uses the network."""

from __future__ import annotations

from pathlib import Path

import pytest

from memos_engine.errors import ModelFilesError
from memos_engine.models import resolve


def _pulled(alias: str) -> Path:
    try:
        return resolve(alias)
    except ModelFilesError as error:
        pytest.skip(f"REAL MODEL NOT TESTED: {error}")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The folder of the real SmolLM2-135M-Instruct; skips, naming the pull command, where it is not there."""
    return _pulled("smollm2")


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """The folder of the real all-MiniLM-L6-v2; skips, naming the pull command, where it is not there."""
    return _pulled("minilm")


@pytest.fixture(autouse=True)
def _own_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Store keys of a test never touch the user's."""
    monkeypatch.setenv("MEMOS_ENGINE_KEYS", str(tmp_path / "memos-engine-keys"))
