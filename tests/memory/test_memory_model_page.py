"""The example of docs/memory-model.md runs, and says what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from memos_engine.memory.lifecycle import MOVES, LifecycleState

PAGE = (Path(__file__).parents[2] / "docs" / "memory-model.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, pipelines = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEMOS_ENGINE_KEYS", str(tmp_path / "keys"))
    names: dict[str, Any] = {}
    exec(first, names)
    store, alice = names["store"], names["alice"]
    assert [cube.body for cube in store.list(alice)] == ["Alice lives in Paris."]
    assert store.get(names["bob"], names["rome"].id).state is LifecycleState.ARCHIVED
    exec(pipelines, names)
    assert len(store.list(alice)) > 1
    store.close()


def test_the_picture_of_the_lifecycle_is_the_table() -> None:
    drawn = set(re.findall(r"^  (\S+) --> (\w+)", PAGE, re.MULTILINE))
    table = {
        (str(source).capitalize() if source else "[*]", str(target).capitalize())
        for source, targets in MOVES.items()
        for target in targets
    }
    assert {pair for pair in drawn if pair[0] == "[*]" or pair[0].istitle()} == table
