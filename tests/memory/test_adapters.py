"""Adapters in the store: whose they are, which version is in use, and what ends them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memos_engine.errors import (
    AccessError,
    ConflictError,
    LifecycleError,
    MemoryInputError,
    MemoryNotFoundError,
    PayloadError,
    StoreError,
)
from memos_engine.memory.adapters import AdapterOption, NewAdapter, choose_adapter
from memos_engine.memory.governance import Principal
from memos_engine.memory.lifecycle import LifecycleState
from memos_engine.memory.store import MemoryStore

MODEL = "a" * 64
SECRET = b"weights that know a secret"


def new(digit: int, **changes: Any) -> NewAdapter:
    return NewAdapter(
        **{"digest": f"{digit:064x}", "model": MODEL, "rank": 4, "nbytes": 10, "kv_floor": 1, **changes}
    )


def put(store: MemoryStore, who: Principal, digit: int = 1, name: str = "mine", **changes: Any) -> Any:
    promote = changes.pop("promote", True)
    return store.put_adapter(who, name, SECRET + bytes([digit]), new(digit, **changes), promote=promote)


def files(store: MemoryStore) -> list[Path]:
    return sorted(store.vault.directory.glob("??/*"))


def events(store: MemoryStore) -> list[str]:
    import json
    import sqlite3

    conn = sqlite3.connect(store.directory / "memory.db")
    found = [json.loads(row[0])["event"] for row in conn.execute("SELECT event FROM audit ORDER BY seq")]
    conn.close()
    return found


def sound(store: MemoryStore) -> None:
    found = store.check()
    assert found.sound, [problem for part in found.parts for problem in part.problems]


def test_versions_promotion_and_rollback(store: MemoryStore, alice: Principal) -> None:
    first = put(store, alice, 1)
    assert (first.version, first.state, first.name) == (1, "current", "mine")
    assert put(store, alice, 1) == first  # the same content is the same version
    second = put(store, alice, 2, promote=False)
    assert (second.cube_id, second.version, second.state) == (first.cube_id, 2, "stored")
    assert store.adapter(alice, "mine").version == 1
    assert store.promote_adapter(alice, first.cube_id, 2).state == "current"
    assert [one.version for one in store.adapters(alice)] == [2]
    assert store.rollback_adapter(alice, first.cube_id).version == 1
    assert store.rollback_adapter(alice, first.cube_id).version == 2  # and back: only the pointer moves
    assert store.rollback_adapter(alice, first.cube_id, 1).version == 1
    for bad in (1, 3, 0, -1):
        with pytest.raises(MemoryInputError, match=r"name one of \[2\]"):
            store.rollback_adapter(alice, first.cube_id, bad)
    moves = [(entry.event, entry.version) for entry in store.history(alice, first.cube_id)]
    assert moves == [
        ("added", 1),
        ("promoted", 1),
        ("promoted", 2),
        ("rolled_back", 1),
        ("rolled_back", 2),
        ("rolled_back", 1),
    ]
    assert events(store).count("adapter_stored") == 2
    sound(store)


def test_one_that_failed_a_gate_is_kept_but_never_used(store: MemoryStore, alice: Principal) -> None:
    report = {"passed": False, "failed": ["leak"], "leak": 0.5}
    with pytest.raises(LifecycleError, match="did not pass \\(leak\\)"):
        put(store, alice, 1, report=report)
    assert files(store) == []
    kept = put(store, alice, 1, report=report, promote=False)
    assert (kept.state, kept.report) == ("stored", report)
    with pytest.raises(LifecycleError):
        store.promote_adapter(alice, kept.cube_id, 1)
    assert events(store).count("move_refused") == 2
    assert store.adapters(alice) == []
    with pytest.raises(MemoryNotFoundError, match="no version in use"):
        store.adapter(alice, "mine")
    with pytest.raises(MemoryInputError, match="no other one"):
        store.rollback_adapter(alice, kept.cube_id)
    sound(store)


def test_the_same_name_with_new_weights_is_another_version(store: MemoryStore, alice: Principal) -> None:
    old, again = put(store, alice, 1), put(store, alice, 2)
    assert old.digest != again.digest
    assert old.blob != again.blob
    assert store.adapter_in_use(alice, old.cube_id, 1).digest == old.digest


def test_nobody_else_has_it(store: MemoryStore, alice: Principal, bob: Principal) -> None:
    mine = put(store, alice)
    assert store.adapters(bob, everything=True) == []
    other = Principal("globex", "alice")  # the same name in another tenant
    for who in (bob, other):
        for verb in (store.adapter, store.rollback_adapter, store.delete, store.erase):
            with pytest.raises(MemoryNotFoundError):
                verb(who, mine.cube_id)
        with pytest.raises(MemoryNotFoundError):
            store.adapter_in_use(who, mine.cube_id, 1)
    # Not even where its description is shared.
    store.govern(alice, mine.cube_id, visibility="shared")
    with pytest.raises(AccessError):
        store.adapter_in_use(bob, mine.cube_id, 1)
    with pytest.raises(AccessError):
        store.rollback_adapter(bob, mine.cube_id)
    assert events(store).count("access_refused") == 2
    assert put(store, bob).cube_id != mine.cube_id
    with pytest.raises(MemoryInputError, match="stays with its owner"):
        store.transfer(bob, mine.cube_id)


def test_sources_are_the_owners_own_and_alive(store: MemoryStore, alice: Principal, bob: Principal) -> None:
    theirs = store.add(bob, "bob's", visibility="shared")
    gone = store.add(alice, "gone")
    store.delete(alice, gone.id)
    with pytest.raises(AccessError):
        put(store, alice, sources=[theirs.id])
    with pytest.raises(MemoryNotFoundError):
        put(store, alice, sources=[gone.id])
    assert store.adapters(alice, everything=True) == []


@pytest.mark.parametrize("verb", ["delete", "erase"])
def test_it_goes_with_a_memory_that_it_was_made_from(store: MemoryStore, alice: Principal, verb: str) -> None:
    dog, cat = store.add(alice, "The dog is Biscuit."), store.add(alice, "The cat is Tom.")
    first = put(store, alice, 1, sources=[cat.id])
    second = put(store, alice, 2, sources=[dog.id, cat.id], report={"questions": ["Who is Biscuit?"]})
    only = put(store, alice, 3, name="only", sources=[dog.id])
    assert [one for one, _ in second.sources] == sorted([dog.id, cat.id])
    assert len(files(store)) == 3
    getattr(store, verb)(alice, dog.id)
    left = store.adapter(alice, "mine")
    assert (left.version, left.stale) == (1, "")  # the pointer went back to the one without it
    assert [path.stem for path in files(store)] == [first.blob.sha256]
    ended = {one.digest: one for one in store.adapters(alice, everything=True)}
    for one in (second, only):
        gone = ended[one.digest]
        assert (gone.state, gone.blob, gone.report) == ("revoked", None, {})
        with pytest.raises(MemoryNotFoundError, match="not used any longer"):
            store.adapter_in_use(alice, one.cube_id, one.version)
    with pytest.raises(ConflictError, match="was revoked"):
        put(store, alice, 2)
    assert (ended[only.digest].name is None) == (verb == "erase")
    assert store.history(alice, only.cube_id)[-1].state is LifecycleState.EXPIRED
    assert events(store).count("adapter_revoked") == 2
    sound(store)
    raw = b"".join(path.read_bytes() for path in store.directory.rglob("*") if path.is_file())
    if verb == "erase":
        assert b"Biscuit" not in raw
    assert SECRET + b"\2" not in raw
    assert SECRET + b"\1" in raw


def test_what_speaks_against_choosing_it(store: MemoryStore, alice: Principal, clock: Any) -> None:
    dog = store.add(alice, "The dog is Biscuit.")
    about = store.add(alice, "He has a dog.", derived_from=[dog.id])
    short = store.add(alice, "For an hour.", ttl_at=clock.now.replace(hour=1))
    put(store, alice, 1, name="a", sources=[about.id])
    put(store, alice, 2, name="b", sources=[dog.id])
    passing = put(store, alice, 3, name="c", sources=[short.id])
    store.update(alice, about.id, "He has a dog and a cat.")
    assert "newer version" in store.adapter(alice, "a").stale
    assert store.adapter(alice, "b").stale == ""
    store.delete(alice, dog.id)
    assert "is gone" in store.adapter(alice, "a").stale
    clock.jump(hours=2)
    with pytest.raises(MemoryNotFoundError, match="is gone"):  # past its time, though nobody swept yet
        store.adapter_in_use(alice, passing.cube_id, 1)
    store.sweep()
    assert len(files(store)) == 1


def test_deleting_and_archiving_the_adapter_itself(store: MemoryStore, alice: Principal) -> None:
    mine = put(store, alice)
    store.archive(alice, mine.cube_id)
    assert store.adapters(alice) == []
    with pytest.raises(MemoryNotFoundError, match="is archived"):
        store.adapter_in_use(alice, mine.cube_id, 1)
    with pytest.raises(LifecycleError):
        put(store, alice, 2)
    store.restore(alice, mine.cube_id)
    assert store.adapter_in_use(alice, mine.cube_id, 1).blob is not None
    copy = put(store, alice, 1, name="copy")
    store.delete(alice, mine.cube_id)
    assert len(files(store)) == 1  # its copy still names it
    store.erase(alice, copy.cube_id)
    assert files(store) == []
    again = put(store, alice, 1)  # a new one under the old name
    assert again.cube_id != mine.cube_id
    sound(store)


def test_it_is_no_text(store: MemoryStore, alice: Principal, reopen: Callable[..., MemoryStore]) -> None:
    text = store.add(alice, "mine too")
    mine = put(store, alice)
    assert [cube.id for cube in store.list(alice)] == [text.id]
    assert store.get(alice, mine.cube_id).kind == "lora"
    assert mine.cube_id not in [cube.id for cube in store.without_vector(alice, "m", 10)]
    assert mine.cube_id not in [row.cube_id for row in store.passages(alice, "m")]
    for act in (
        lambda: store.update(alice, mine.cube_id, "words"),
        lambda: store.rollback(alice, mine.cube_id, 2),
    ):
        with pytest.raises(LifecycleError, match="adapter import"):
            act()
    scope = store.branch(alice, "what_if")
    assert [cube.body for cube in store.list(scope)] == ["mine too"]
    with pytest.raises(MemoryInputError, match="own scope"):
        put(store, scope)
    before = store.now()
    put(store, alice, 2)
    store.rollback_to(alice, before)
    assert store.adapter(alice, "mine").version == 2
    assert store.stats()["adapters"] == 2
    store.close()
    assert reopen().adapter(alice, "mine").version == 2


def test_a_damaged_payload_is_found_and_mended_by_the_same_import(
    store: MemoryStore, alice: Principal
) -> None:
    mine = put(store, alice)
    path = store.vault.path(mine.blob)
    path.write_bytes(b"X" + path.read_bytes()[1:])
    with pytest.raises(PayloadError):
        store.vault.read(mine.blob)
    found = store.check(repair=True)
    assert not found.sound
    assert "import it again" in str([part.problems for part in found.parts])
    assert store.collect(0) == 0
    assert store.adapter(alice, "mine").blob is not None  # the row stays: nothing makes it anew
    put(store, alice)
    sound(store)


def test_nothing_malformed_is_stored(store: MemoryStore, alice: Principal) -> None:
    for changes in (
        {"digest": "x"},
        {"digest": "A" * 64},
        {"model": ""},
        {"rank": 0},
        {"rank": True},
        {"nbytes": -1},
        {"how": "found"},
        {"report": {"x": float("nan")}},
        {"sources": "one"},
    ):
        with pytest.raises((MemoryInputError, StoreError)):
            put(store, alice, 1, **changes)
    for name in ("", " ", "x" * 200, "a\0b", None):
        with pytest.raises(MemoryInputError):
            put(store, alice, 1, name=name)
    assert store.adapters(alice, everything=True) == []


def test_a_name_that_is_two_wants_an_id(store: MemoryStore, alice: Principal) -> None:
    mine = put(store, alice)
    assert store.adapter(alice, mine.cube_id[:13]).cube_id == mine.cube_id
    assert store.adapter(alice, mine.cube_id, 1) == store.adapter(alice, "mine")
    for given, version in (("other", None), ("mine", 2), (mine.cube_id[:4], None)):
        with pytest.raises(MemoryNotFoundError):
            store.adapter(alice, given, version)


# -- the gate ------------------------------------------------------------------------------------


def option(name: str, probability: float) -> AdapterOption:
    return AdapterOption(name, 1, "d", probability, 10)


def test_the_gate_says_none_unless_one_is_sure() -> None:
    assert choose_adapter([]).option is None
    assert "below" in choose_adapter([option("a", 0.4)]).reason
    assert "equally" in choose_adapter([option("a", 0.9), option("b", 0.85)]).reason
    chosen = choose_adapter([option("b", 0.6), option("a", 0.9)])
    assert chosen.option == option("a", 0.9)
    assert chosen.rejected[0][0] == "b"
    assert option("a", 1.0).priced(2.5).swap_ms == 2.5
