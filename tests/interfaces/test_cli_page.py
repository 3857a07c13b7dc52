"""The session of docs/cli.md is run, and the page shows what it prints.

With UPDATE_DOCS=1 in the environment the page is written anew instead.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from typer.testing import CliRunner

from memos_engine.interfaces import cli, cli_upkeep, options
from memos_engine.memory import governance, store_base
from memos_engine.memory import store as store_module
from memos_engine.memory.cube import CubeIds, Fact
from memos_engine.memory.governance import Principal
from memos_engine.memory.store import MemoryStore

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
ALICE, BOB = Principal("default", "alice"), Principal("default", "bob")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A store whose times, ids and keys are always the same."""
    now = datetime(2026, 1, 1, tzinfo=timezone.utc)

    def clock() -> datetime:
        nonlocal now
        now += timedelta(seconds=1)
        return now

    monkeypatch.setattr(store_module, "utc_now", clock)
    monkeypatch.setattr(store_base, "CubeIds", lambda: CubeIds(bytes))
    monkeypatch.setattr(governance.secrets, "token_bytes", bytes)
    monkeypatch.setattr(options.console, "_width", 110)
    monkeypatch.setenv("MEMOS_ENGINE_STORE", str(tmp_path / "memory"))
    monkeypatch.setenv("MEMOS_ENGINE_USER", "alice")
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    with MemoryStore.open(tmp_path / "memory") as store:
        dog = store.add(ALICE, "My dog is called Biscuit.", tags=["pets"])
        store.put_kv(ALICE, dog.id, 1, "identity", b"record" * 100, 7)
        store.add(ALICE, "Alice lives in Paris.", fact=Fact("Alice", "home"))
        store.add(BOB, "My cat is called Tom.", tags=["pets"], visibility="read_only")
    yield tmp_path / "memory"
    monkeypatch.undo()
    time.tzset()


def flip(place: Path) -> None:
    path = next(place.rglob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


def session(commands: list[str], flip_bit: Callable[[], None]) -> str:
    """What a terminal would show."""
    shown = []
    for line in commands:
        shown.append(line)
        if line.startswith("#"):
            flip_bit()
            continue
        arguments = shlex.split(line.removeprefix("$ memos-engine "))
        result = CliRunner().invoke(cli.app, arguments)
        output = result.stdout
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            output += f"error: {result.exception}\n"
        shown.append("\n".join(row.rstrip() for row in output.splitlines()))
    return "\n".join(shown)


def test_the_page_shows_what_the_commands_print(place: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")

    def run(block: re.Match[str]) -> str:
        commands = [line for line in block[1].splitlines() if line.startswith(("$ ", "# "))]
        return f"```console\n{session(commands, lambda: flip(place))}\n```"

    written = re.sub(r"```console\n(.*?)\n```", run, page, flags=re.DOTALL)
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(written, encoding="utf-8")
    # How many pages a database has is SQLite's affair.
    plain = [re.sub(r"\d+ pages *", "N pages ", text).splitlines() for text in (written, page)]
    assert plain[0] == plain[1], "run this test with UPDATE_DOCS=1 and read what changed"


def test_the_page_names_every_part_that_is_checked(place: Path) -> None:
    parts = [part.name for part in cli_upkeep._checked(place, False).parts]
    assert re.findall(r"^\| (\w+) \| ", PAGE.read_text(encoding="utf-8"), re.MULTILINE)[1:] == parts
