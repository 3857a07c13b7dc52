"""Pipelines: one state, one transaction, faults where they belong."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_engine.errors import MemoryInputError, StoreError
from memos_engine.memory.governance import Principal
from memos_engine.memory.lifecycle import LifecycleState
from memos_engine.memory.memory_api import MemoryAPI
from memos_engine.memory.operator import MemOperator
from memos_engine.memory.pipeline import Pipeline, PipelineState, Step
from memos_engine.memory.steps import STEPS, TEMPLATES, pipeline_of
from memos_engine.memory.store import MemoryStore


@pytest.fixture
def api(store: MemoryStore, alice: Principal) -> MemoryAPI:
    return MemoryAPI(store, MemOperator(store), alice)


def note(name: str, **options: Any) -> Step:
    def act(api: MemoryAPI, state: PipelineState) -> None:
        state.cubes = list(api.create(f"by {name}").require().cubes)
        state.values.setdefault("order", []).append(name)

    return Step(name, act, **options)


def fail(name: str, error: Exception, **options: Any) -> Step:
    def act(api: MemoryAPI, state: PipelineState) -> None:
        api.create(f"by {name}").require()
        state.text = "spoiled"
        raise error

    return Step(name, act, **options)


def texts(api: MemoryAPI) -> list[str | None]:
    return [cube.body for cube in api.store.list(api.principal)]


def test_a_step_that_fails_undoes_all(api: MemoryAPI) -> None:
    broken = Pipeline("p", [note("one"), fail("two", MemoryInputError("no")), note("three")])
    reply = broken.run(api)
    assert (reply.ok, reply.done, dict(reply.failed)) == (False, ("one",), {"two": "no"})
    assert texts(api) == []
    with pytest.raises(MemoryInputError):
        reply.require()
    assert json.loads(json.dumps(reply.to_dict()))["failed"] == {"two": "no"}


def test_an_isolated_step_takes_only_itself_back(api: MemoryAPI) -> None:
    steps = [note("one"), fail("two", StoreError("no"), isolated=True), note("three")]
    reply = Pipeline("p", steps).run(api, "words")
    assert (reply.ok, reply.done, dict(reply.failed)) == (True, ("one", "three"), {"two": "no"})
    assert texts(api) == ["by one", "by three"]
    assert reply.state.text == "words"
    api.store.audit_verify()


def test_a_bug_undoes_all_and_is_raised(api: MemoryAPI) -> None:
    with pytest.raises(ZeroDivisionError):
        Pipeline("p", [note("one"), fail("two", ZeroDivisionError(), isolated=True)]).run(api)
    assert texts(api) == []


def test_nothing_is_locked_before_the_first_change(
    reopen: Callable[..., MemoryStore], alice: Principal
) -> None:
    store, other = reopen(), reopen()
    api = MemoryAPI(store, MemOperator(store), alice)

    def slow(text: str, bodies: list[str]) -> str:
        other.add(alice, "meanwhile")  # a model at work must not keep others from writing
        return text.upper()

    steps = [Step("augment", STEPS["augment"](slow), writes=False), Step("create", STEPS["create"]())]
    assert Pipeline("p", steps).run(api, "words").require().state.cubes[0].body == "WORDS"
    assert texts(api) == ["meanwhile", "WORDS"]


def test_a_memory_that_changed_meanwhile_is_a_conflict(api: MemoryAPI) -> None:
    cube = api.create("the mill is old").cube

    def slow(text: str, bodies: list[str]) -> str:
        api.update(cube.id, "the mill is new")
        return text

    steps = [
        Step("retrieve", STEPS["retrieve"](k=1), writes=False),
        Step("augment", STEPS["augment"](slow), writes=False),
        Step("update", STEPS["update"]()),
    ]
    reply = Pipeline("p", steps).run(api, "the mill burned")
    assert not reply.ok
    assert "update" in reply.failed
    assert texts(api) == ["the mill is new"]


@given(st.permutations(range(5)))
def test_order_follows_what_steps_wait_for(order: list[int]) -> None:
    """A diamond: 0 before 1 and 2, both before 3; 4 stands alone."""
    needs: dict[int, tuple[str, ...]] = {0: (), 1: ("0",), 2: ("0",), 3: ("1", "2"), 4: ()}
    steps = [Step(str(n), lambda api, state: None, after=needs[n]) for n in order]
    names = [step.name for step in Pipeline("p", steps).steps]
    assert sorted(names) == ["0", "1", "2", "3", "4"]
    for step, wanted in needs.items():
        assert all(names.index(need) < names.index(str(step)) for need in wanted)


def test_what_cannot_be_ordered(api: MemoryAPI) -> None:
    for steps in (
        [note("one"), note("one")],
        [note("one", after=("zero",))],
        [note("one", after=("two",)), note("two", after=("one",))],
    ):
        with pytest.raises(MemoryInputError):
            Pipeline("p", steps)


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_survive_json(api: MemoryAPI, name: str) -> None:
    api.create(["the mill is old", "the mill is old"])
    again = json.loads(json.dumps({"name": name, "steps": TEMPLATES[name]}))
    moment = api.store.now()
    for pipeline in (pipeline_of(name), pipeline_of(again)):
        reply = pipeline.run(api, "the mill burned", to=moment)
        if name == "transfer":  # to herself: hers already
            assert not reply.ok
        else:
            reply.require()
            assert reply.done == tuple(step.name for step in pipeline.steps)


def test_remember_as_the_paper_chains_it(api: MemoryAPI) -> None:
    cube = api.create("the mill is old").cube
    reply = pipeline_of("remember").run(api, "the mill has three floors").require()
    assert reply.state.cubes[0].id == cube.id
    assert reply.state.cubes[0].body == "the mill is old\nthe mill has three floors"
    fresh = MemoryAPI(api.store, api.operator, Principal("acme", "carol"))
    made = pipeline_of("remember").run(fresh, "nothing was known").require().state.cubes[0]
    assert made.body == "nothing was known"


def test_purification_merges_what_says_the_same(api: MemoryAPI) -> None:
    first, second = api.create(["the mill is old", "The mill is old!"]).cubes
    reply = pipeline_of("purification").run(api, "mill").require()
    made = reply.state.cubes[0]
    assert made.body == "the mill is old\nThe mill is old!"
    for old in (first, second):
        assert api.store.get(api.principal, old.id).state is LifecycleState.ARCHIVED


@pytest.mark.parametrize(
    "bad",
    [
        "nothing",
        {},
        {"name": "p", "steps": 3},
        {"name": "p", "steps": [{"k": 3}]},
        {"name": "p", "steps": [{"do": "fly"}]},
        {"name": "p", "steps": [{"do": "retrieve", "much": 3}]},
        {"name": "p", "steps": [{"do": "retrieve", "after": ["x"]}]},
    ],
)
def test_bad_templates(bad: Any) -> None:
    with pytest.raises(MemoryInputError):
        pipeline_of(bad)
