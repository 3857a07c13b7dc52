"""The Memory API: structured replies, whole calls or nothing, provenance for life."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from memos_engine.errors import AccessError, ConflictError, MemoryNotFoundError
from memos_engine.memory.cube import Fact, Provenance
from memos_engine.memory.governance import Principal
from memos_engine.memory.lifecycle import LifecycleState
from memos_engine.memory.memory_api import ApiReply, LogQuery, MemoryAPI
from memos_engine.memory.new import NewMemory
from memos_engine.memory.operator import MemOperator
from memos_engine.memory.reader import MemReader
from memos_engine.memory.store import MemoryStore

MISSING = "00000000-0000-7000-8000-000000000000"


@pytest.fixture
def api(store: MemoryStore, alice: Principal, toy: Callable[..., object]) -> MemoryAPI:
    source = Provenance(trigger="chat", model="tiny")
    return MemoryAPI(store, MemOperator(store, toy()), alice, source)  # type: ignore[arg-type]


def test_create_and_query(api: MemoryAPI, store: MemoryStore, alice: Principal) -> None:
    made = api.create(["the harbour", NewMemory("the mill", tags=("work",))], tags=("home",))
    assert made.ok
    assert [(c.body, c.tags) for c in made.cubes] == [("the harbour", ("home",)), ("the mill", ("work",))]
    assert all(c.provenance == api.provenance for c in made.cubes)
    assert not store.without_vector(alice, "toy", 9)  # embedded at once
    found = api.query("harbour", 1)
    assert [c.id for c in found.cubes] == [made.cubes[0].id]
    assert json.loads(json.dumps(found.to_dict()))["status"] == "ok"
    whole = api.create(["fine", ""])
    assert (whole.status, whole.cubes) == ("invalid", ())
    assert len(store.list(alice)) == 2  # all or none


def test_statuses_say_what_was_wrong(
    api: MemoryAPI, store: MemoryStore, alice: Principal, bob: Principal
) -> None:
    cube = api.create("text").cube
    theirs = MemoryAPI(store, api.operator, bob)
    assert theirs.update(cube.id, "mine now").status == "not_found"
    store.govern(alice, cube.id, visibility="read_only")
    assert theirs.update(cube.id, "mine now").status == "refused"
    assert api.update(cube.id, "other", if_version=7).status == "conflict"
    assert api.update(cube.id, "other", "sideways").status == "invalid"
    gone = api.update(MISSING, "other")
    with pytest.raises(MemoryNotFoundError):
        gone.require()
    with pytest.raises(MemoryNotFoundError):
        _ = gone.cube
    assert store.get(alice, cube.id).body == "text"


@pytest.mark.parametrize(
    ("mode", "text"),
    [("overwrite", "one\nthree"), ("append", "one\ntwo\none\nthree"), ("merge", "one\ntwo\nthree")],
)
def test_update_modes(api: MemoryAPI, mode: str, text: str) -> None:
    cube = api.create("one\ntwo").cube
    new = api.update(cube.id, "one\nthree", mode).cube
    assert (new.body, new.version, new.provenance_id) == (text, 2, cube.provenance_id)
    assert new.provenance == api.provenance


def test_compose(api: MemoryAPI, store: MemoryStore, alice: Principal) -> None:
    one, two = api.create(["a\nb", "b\nc"], tags=("x",)).cubes
    made = api.compose([one.id, two.id, one.id], archive=True, tags=("y",)).cube
    assert (made.body, made.tags, made.origin) == ("a\nb\nc", ("y",), "inference")
    assert {(e.kind, e.target) for e in store.lineage(alice, made.id)} == {
        ("derived_from", one.id),
        ("derived_from", two.id),
    }
    assert store.get(alice, one.id).state is LifecycleState.ARCHIVED
    assert api.compose([]).status == "invalid"
    assert api.compose([MISSING]).status == "not_found"
    third = api.create("third").cube
    store.freeze(alice, third.id)
    before = len(store.list(alice))
    assert api.compose([third.id], archive=True).status == "refused"  # a frozen memory is not archived
    assert len(store.list(alice)) == before  # so nothing was made of it either


def test_compose_notices_a_change(api: MemoryAPI, store: MemoryStore, alice: Principal) -> None:
    cube = api.create("text").cube

    def slow(parts: object) -> str:
        store.update(alice, cube.id, "changed meanwhile")
        return "summary"

    reply = api.compose([cube.id], slow)
    assert isinstance(reply.error, ConflictError)
    assert len(store.list(alice)) == 1


def test_transfer_needs_a_welcome(
    api: MemoryAPI, store: MemoryStore, alice: Principal, bob: Principal
) -> None:
    cube = api.create("the harbour", fact=Fact("alice", "place"), tags=("t",)).cube
    assert isinstance(api.transfer(cube.id, bob).error, AccessError)
    assert store.list(bob) == []
    store.grant(bob, "write", to=alice)
    copy = api.transfer(cube.id, bob).cube
    assert (copy.owner, copy.body, copy.tags, copy.fact) == (bob, cube.body, cube.tags, cube.fact)
    assert (copy.provenance_id, copy.visibility) == (cube.provenance_id, "private")
    assert not store.without_vector(bob, "toy", 9)
    assert store.get(alice, cube.id).state is not LifecycleState.ARCHIVED
    store.grant(bob, "write", to=alice, effect="deny")
    assert api.transfer(cube.id, bob).status == "refused"
    other = Principal("elsewhere", "bob")
    assert api.transfer(cube.id, other).status == "invalid"
    store.erase(alice, cube.id, cascade=True)
    assert store.list(bob) == []  # a copy goes with its original where that is asked for


def test_a_memory_comes_back_from_a_branch(api: MemoryAPI, store: MemoryStore, alice: Principal) -> None:
    branch = store.branch(alice, "aside")
    inside = MemoryAPI(store, api.operator, branch)
    tried = inside.create("worked out well").cube
    back = inside.transfer(tried.id, alice, keep=False).cube
    assert (back.owner, back.body) == (alice, "worked out well")
    assert store.get(branch, tried.id).state is LifecycleState.ARCHIVED
    assert api.transfer(back.id).status == "invalid"  # it is hers already


def test_adopting_what_others_share(
    store: MemoryStore, api: MemoryAPI, alice: Principal, bob: Principal
) -> None:
    cube = store.add(bob, "shared words", visibility="read_only")
    copy = api.transfer(cube.id).cube
    assert (copy.owner, copy.body) == (alice, "shared words")
    assert api.transfer(cube.id, keep=False).status == "refused"  # reading is no leave to put away
    store.govern(bob, cube.id, visibility="private")
    assert store.get(alice, copy.id).body == "shared words"


def test_audit(api: MemoryAPI, store: MemoryStore, bob: Principal) -> None:
    cube = api.create("text").cube
    store.add(bob, "of somebody else")
    api.update(cube.id, "other")
    events = api.audit(LogQuery(cube_id=cube.id)).require().events
    assert [event["event"] for event in events] == ["added", "updated"]
    assert [event["event"] for event in api.audit().events] == ["added", "updated"]  # nothing of bob's
    assert api.audit(LogQuery(event="updated", limit=1)).events == events[1:]
    assert api.audit(LogQuery(limit=0)).status == "invalid"


def test_what_is_said_is_carried_out(
    api: MemoryAPI, store: MemoryStore, alice: Principal, bob: Principal
) -> None:
    reader, now = MemReader(), store.now()

    def say(words: str, who: MemoryAPI = api) -> ApiReply:
        return who.carry_out(reader.read(who.principal, words, now=now))

    made = say("Please remember that the harbour is old.").cube
    assert made.body == "the harbour is old."
    theirs = store.add(bob, "the harbour of bob", visibility="read_only")
    assert {c.id for c in say("What do you know about the harbour?").cubes} == {made.id, theirs.id}
    for words in ("Forget what I said about the harbour.", "Forget it."):
        say(words)
        assert store.get(alice, made.id) == made  # words alone end nothing
    call = reader.read(bob, "Remember my sister.", now=now)
    assert api.carry_out(call).status == "invalid"
