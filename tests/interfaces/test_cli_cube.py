"""`memos-engine cube`, history, audit and grants: what people and programs read, without any model."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from memos_engine.errors import (
    ConflictError,
    LifecycleError,
    MemoryInputError,
    MemoryNotFoundError,
    MemosEngineError,
    NotAStoreError,
)
from memos_engine.interfaces import cli, options
from memos_engine.memory.cube import Fact
from memos_engine.memory.governance import Principal
from memos_engine.memory.store import MemoryStore

ALICE, BOB = Principal("default", "alice"), Principal("default", "bob")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEMOS_ENGINE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("MEMOS_ENGINE_USER", "alice")
    monkeypatch.setattr(options.console, "_width", 160)
    return tmp_path / "store"


@pytest.fixture
def ids(place: Path) -> list[str]:
    """Alice's dog and home, Bob's open cat."""
    with MemoryStore.open(place) as store:
        dog = store.add(ALICE, "My dog is called [/x] Biscuit.", tags=["pets", "dog"])
        home = store.add(ALICE, "Alice lives in Paris.", fact=Fact("Alice", "home"))
        cat = store.add(BOB, "My cat is called Tom.", tags=["pets"], visibility="read_only")
    return [dog.id, home.id, cat.id]


def run(*args: object, **kwargs: Any) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in args], catch_exceptions=False, **kwargs)


def text(*args: object) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def data(*args: object) -> Any:
    """The one JSON document that a command prints."""
    return json.loads(text(*args, "--json"))


def test_ls(ids: list[str]) -> None:
    dog, home, cat = ids
    listed = lambda *args: [cube["id"] for cube in data("cube", "ls", *args)]  # noqa: E731
    assert listed() == ids
    assert listed("--own") == [dog, home]
    assert listed("--tag", "pets") == [dog, cat]
    assert listed("--tag", "pets", "--tag", "dog") == [dog]
    assert listed("--limit", 1) == [cat]
    assert listed("--as-of", "2020-01-01") == []
    data("cube", "archive", dog)
    assert listed("--own") == [home]
    assert listed("--own", "--all") == [dog, home]
    assert listed("--state", "archived") == [dog]
    assert listed("--state", "archived", "--state", "generated") == ids
    shown = text("cube", "ls", "--all")
    assert "[/x]" in shown
    assert all(one in shown for one in (*ids, "owner", "bob"))
    assert "owner" not in text("cube", "ls", "--own")
    assert "No memory" in text("cube", "ls", "--tag", "none")


def test_what_is_true_at_a_time(ids: list[str], place: Path) -> None:
    with MemoryStore.open(place) as store:
        rome = store.add(
            ALICE, "Alice moved.", fact=Fact("Alice", "home", datetime(2040, 1, 1, tzinfo=timezone.utc))
        )
    homes = lambda *args: {c["id"] for c in data("cube", "ls", "--own", *args)} - {ids[0]}  # noqa: E731
    assert homes("--valid-at", "2039-01-01T00:00:00Z") == {ids[1]}
    assert homes("--valid-at", "2041-01-01T00:00:00+00:00") == {rome.id}


def test_show_and_diff(ids: list[str]) -> None:
    dog, home, _ = ids
    data("cube", "update", dog, "He likes bones.", "--mode", "append", "--tag", "bones")
    cube = data("cube", "show", dog)
    assert cube["body"].endswith("Biscuit.\nHe likes bones.")
    first = data("cube", "show", dog, "--version", 1)
    assert (first["version"], first["state"]) == (1, "generated")
    assert data("cube", "show", dog, "--as-of", first["descriptive"]["updated_at"]) == first
    shown = text("cube", "show", home)
    assert "home of Alice from" in shown
    assert shown.endswith("\n\nAlice lives in Paris.\n")
    changes = data("cube", "diff", dog, 1, 2)
    assert changes["lines"][-1] == "+He likes bones."
    assert changes["tags_added"] == ["bones"]
    assert data("cube", "diff", dog, first["descriptive"]["updated_at"], 2) == changes
    assert "+He likes bones.\n+tag bones\n" in text("cube", "diff", dog, 1, 2)
    assert "say the same" in text("cube", "diff", dog, 2, 2)


def test_differences_are_coloured_in_a_terminal(ids: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    data("cube", "update", ids[0], "He likes bones.")
    monkeypatch.setattr(options.console, "_force_terminal", True)
    monkeypatch.setattr(options.console, "_color_system", 1)
    assert "\x1b[32m+He likes bones." in text("cube", "diff", ids[0], 1, 2)


def test_changing(ids: list[str]) -> None:
    dog = ids[0]
    assert data("cube", "update", dog, "new", "--if-version", 1)["version"] == 2
    with pytest.raises(ConflictError):
        run("cube", "update", dog, "newer", "--if-version", 1)
    assert run("cube", "update", dog, "-", input="from a pipe").exit_code == 0
    assert data("cube", "show", dog)["body"] == "from a pipe"
    assert data("cube", "freeze", dog)["state"] == "frozen"
    with pytest.raises(LifecycleError, match="unfreeze"):
        run("cube", "update", dog, "x")
    for verb, said in (("unfreeze", "Unfrozen"), ("archive", "Archived"), ("restore", "Restored")):
        assert text("cube", verb, dog) == f"{said}: {dog}\n"
    with pytest.raises(MemoryInputError, match="mode"):
        run("cube", "update", dog, "x", "--mode", "rewrite")


def test_going_back(ids: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    dog, home, _ = ids
    before = data("history", home)[0]["at"]
    data("cube", "update", dog, "wrong")
    assert "-wrong" in text("cube", "rollback", dog, 1, "--dry-run")
    assert data("cube", "show", dog)["version"] == 2
    assert data("cube", "rollback", dog, 1, "--if-version", 2)["version"] == 3
    data("cube", "archive", home)
    data("cube", "update", dog, "wrong again")
    would = data("cube", "rollback", "--to", before, "--dry-run")
    assert would["restored"] == [dog, home]
    assert data("cube", "show", dog)["body"] == "wrong again"
    assert "Would be taken back" in text("cube", "rollback", "--to", before, "--dry-run")
    # On a terminal it asks first.
    monkeypatch.setattr("memos_engine.interfaces.cli_cube.on_terminal", lambda: True)
    refused = run("cube", "rollback", "--to", before, input="n\n")
    assert refused.exit_code == 1
    assert "Will be taken back" in refused.stdout
    assert data("cube", "show", dog)["body"] == "wrong again"
    assert "Taken back" in run("cube", "rollback", "--to", before, input="y\n").stdout
    data("cube", "update", dog, "wrong once more")
    assert "Taken back" in text("cube", "rollback", "--to", before, "--yes")
    assert data("cube", "show", dog)["body"] == "My dog is called [/x] Biscuit."
    assert "Nothing differs" in text("cube", "rollback", "--to", data("history", dog)[-1]["at"], "--yes")


def test_branches(ids: list[str]) -> None:
    assert data("cube", "branch", "make", "what_if") == {"branch": "what_if", "memories": 2}
    copies = data("cube", "ls", "--branch", "what_if")
    assert [c["body"] for c in copies] == [c["body"] for c in data("cube", "ls", "--own")]
    data("cube", "update", copies[0]["id"], "elsewhere", "--branch", "what_if")
    assert "elsewhere" not in text("cube", "ls")
    assert "what_if" in text("cube", "branch", "ls")
    assert data("history", copies[0]["id"], "--branch", "what_if")[-1]["event"] == "updated"
    assert data("cube", "branch", "drop", "what_if") == {"dropped": "what_if", "memories": 2}
    assert data("cube", "branch", "ls")[0]["dropped_at"]
    with pytest.raises(MemoryNotFoundError, match="branch"):
        run("cube", "ls", "--branch", "what_if")


def test_history_of_a_moment(ids: list[str]) -> None:
    data("cube", "freeze", ids[0])
    first, second = data("history", ids[0])
    assert data("history", ids[0], "--as-of", first["at"]) == [first]
    assert second["at"].endswith("+00:00")
    shown = text("history", ids[0])
    line = next(row for row in shown.splitlines() if "frozen" in row)
    when = line.split("│")[1].strip()  # what a table shows may be given back
    assert data("history", ids[0], "--as-of", when) == [first, second]


def test_the_beginning_of_an_id_is_enough(ids: list[str], place: Path) -> None:
    assert data("cube", "show", ids[0][:-1])["id"] == ids[0]
    with pytest.raises(MemoryInputError, match="several memories"):
        run("cube", "show", ids[0][:8])
    with pytest.raises(MemoryInputError, match="too short"):
        run("history", ids[0][:4])


def test_grants(ids: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    dog = ids[0]
    made = data("grant", "read", "--to", "bob", "--id", dog[:-1], "--until", "2090-01-01")
    assert (made["cube_id"], made["effect"]) == (dog, "allow")
    assert made["expires_at"].startswith(("2089-12-31", "2090-01-01"))
    assert "may not write all memories of alice." in text("grant", "write", "--everybody", "--deny")
    assert [g["id"] for g in data("grants")] == [1, 2]
    assert len(data("grants", "--id", dog)) == 1
    assert f"Grant 1: bob may read memory {dog} of alice until" in text("grants")
    assert data("cube", "show", dog, "--user", "bob")["id"] == dog
    assert "Revoked: grant 1." in text("revoke", 1)
    data("revoke", 2)
    assert "No grant" in text("grants")
    with pytest.raises(MemoryNotFoundError):
        run("cube", "show", dog, "--user", "bob")


def test_the_audit_trail(ids: list[str], place: Path) -> None:
    dog = ids[0]
    data("cube", "freeze", dog)
    found = data("audit", "verify")
    assert (found["sound"], found["events"], found["head"]["seq"]) == (True, 5, 5)
    assert "5 events" in text("audit", "verify")
    events = lambda *args: [e["event"] for e in data("audit", "log", *args)]  # noqa: E731
    assert events() == ["added", "added", "frozen"]
    assert events("--user", "bob") == ["added"]
    assert events("--all") == ["store_created", "added", "added", "added", "frozen"]
    assert events("--id", dog) == ["added", "frozen"]
    assert events("--all", "--id", dog, "--limit", 1) == ["frozen"]
    assert events("--event", "frozen") == ["frozen"]
    assert events("--until", "2020-01-01") == []
    assert len(events("--since", "2020-01-01T00:00:00Z")) == 3
    assert f"frozen          {dog}  state frozen, version 1" in text("audit", "log")
    assert "bob" in text("audit", "log", "--all")
    assert "No event" in text("audit", "log", "--event", "nothing")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["cube", "ls", "--as-of", "yesterday"], MemoryInputError),
        (["cube", "ls", "--store", "nowhere"], NotAStoreError),
        (["cube", "show", "nobody"], MemoryNotFoundError),
        (["cube", "show", "DOG", "--version", "9"], MemoryInputError),
        (["cube", "show", "DOG", "--as-of", "0001-01-01"], MemosEngineError),
        (["cube", "diff", "DOG", "1", "9"], MemoryInputError),
        (["cube", "diff", "DOG", "1", "x"], MemoryInputError),
        (["cube", "freeze", "nobody"], MemoryNotFoundError),
        (["cube", "restore", "DOG"], LifecycleError),
        (["cube", "rollback", "DOG", "1"], MemoryInputError),
        (["cube", "rollback", "--to", "2999-01-01"], MemoryInputError),
        (["cube", "branch", "make", "What If"], MemoryInputError),
        (["cube", "branch", "drop", "none"], MemoryNotFoundError),
        (["history", "DOG", "--as-of", "2020-13-01"], MemoryInputError),
        (["grant", "destroy", "--to", "bob"], MemoryInputError),
        (["grant", "read", "--to", "bob", "--until", "2020-01-01"], MemoryInputError),
        (["revoke", "7"], MemoryNotFoundError),
        (["audit", "log", "--id", "nobody"], MemoryNotFoundError),
        (["audit", "verify", "--store", "."], NotAStoreError),
        (["cube", "gc", "--store", "nowhere"], NotAStoreError),
        (["cube", "verify", "--store", "nowhere"], NotAStoreError),
    ],
)
def test_expected_errors_are_one_line(
    arguments: list[str],
    error: type[Exception],
    ids: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [ids[0] if a == "DOG" else a for a in arguments]
    monkeypatch.setattr(sys, "argv", ["memos-engine", *arguments, "--json"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    captured = capsys.readouterr()
    kind = json.loads(captured.out)["error"]
    assert kind == error.__name__ or error is MemosEngineError
    assert "Traceback" not in captured.err
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["cube", "ls", "--state", "expired"],
        ["cube", "ls", "--state", "frozen", "--all"],
        ["cube", "ls", "--limit", "0"],
        ["cube", "show", "x", "--version", "1", "--as-of", "2020-01-01"],
        ["cube", "rollback"],
        ["cube", "rollback", "x"],
        ["cube", "rollback", "x", "1", "--to", "2020-01-01"],
        ["grant", "read"],
        ["grant", "read", "--to", "bob", "--everybody"],
        ["audit", "log", "--all", "--user", "bob"],
    ],
)
def test_contradictory_arguments_are_usage_errors(arguments: list[str], ids: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_no_model_and_no_torch(ids: list[str]) -> None:
    code = (
        "import sys; sys.argv[1:] = ['cube', 'ls', '--json']\n"
        "from memos_engine.interfaces import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == 3
