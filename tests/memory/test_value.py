"""Value: rates that fade, tiers bounded to the byte, moves that need a margin, plans of all six paths."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_engine.errors import MemoryInputError
from memos_engine.memory.transform import GATES, Known, TransformPolicy, plan, swap
from memos_engine.memory.value import Keeper, Pace, Usage, best_place

SAVED = {"disk": 80.0, "host": 98.0, "device": 100.0}
PRICES = {"disk": 1e-9, "host": 1e-7, "device": 1e-5}


def known(name="a", **changes):
    return Known(
        **{"cube_id": name, "owner": "alice", "rate": 0.001, "nbytes": 10**6, "saved_ms": SAVED, **changes}
    )


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=40), st.floats(1, 1e3))
def test_a_count_is_the_sum_of_its_faded_uses_whatever_the_steps(gaps, half_life):
    usage, now, times = Usage(), 0.0, []
    for gap in gaps:
        now += gap
        times.append(now)
        usage = usage.used(now, half_life)
    expected = math.fsum(0.5 ** ((now - at) / half_life) for at in times)
    assert usage.counted(now, half_life) == pytest.approx(expected, rel=1e-9)
    assert usage.counted(now - 5, half_life) == usage.counted(now, half_life)  # a clock that went back
    assert usage.counted(now + half_life, half_life) == pytest.approx(expected / 2)


def test_a_steady_rate_is_found():
    usage = Usage()
    for i in range(4000):
        usage = usage.used(i * 2.0, 500.0)
    assert usage.rate(8000.0, 500.0) == pytest.approx(0.5, rel=0.01)


wants = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 40), st.sampled_from("ab")), max_size=80)


@given(wants, st.integers(0, 100), st.integers(1, 8))
def test_a_keeper_holds_what_it_says_and_never_more(todo, most, ghosts):
    keeper = Keeper(most, ghosts=ghosts)
    for now, (key, size, group) in enumerate(todo):
        keeper.used(key, now, group)
        assert len(keeper._usage) <= ghosts + len(keeper.held)
        left = keeper.offer(key, size, 1.0, now)
        assert (key in keeper.held) == (left is not None)
        assert keeper.nbytes == sum(h.nbytes for h in keeper.held.values()) <= most
        assert not set(left or ()) & set(keeper.held)
        members = sum(g.members for g in keeper._groups.values())
        assert members == len(keeper._usage)
    for key in list(keeper.held):
        keeper.forget(key)
    assert keeper.nbytes == 0


def test_what_is_read_once_pushes_nothing_out_and_two_of_like_worth_do_not_take_turns():
    keeper = Keeper(2)
    moves = 0
    for now in range(400):
        name = f"once {now}" if now % 4 == 3 else ("a", "b", "c")[now % 3]
        keeper.used(name, now)
        moves += name not in keeper.held and keeper.offer(name, 1, 1.0, now) is not None
    assert set(keeper.held) <= {"a", "b", "c"}
    assert moves < 12


def test_milliseconds_count_by_the_byte():
    keeper = Keeper(11)
    for name, size, saved in (("large", 10, 6.0), ("tiny", 1, 2.0), ("better", 10, 9.0)):
        keeper.used(name, 0)
        left = keeper.offer(name, size, saved, 0)
    assert left == ["large"]  # though a use of the tiny one saves less
    assert keeper.offer("large", 10, 6.0, 0) is None


rates = st.floats(0, 1e3)


@given(rates, st.integers(0, 10**9), st.sampled_from(["text", "disk", "host", "device"]), st.floats(0, 1))
def test_a_place_that_was_moved_to_is_stayed_in(rate, nbytes, here, margin):
    saved = {"text": 0.0, **SAVED}
    there = best_place(rate, nbytes, saved, PRICES, here, margin)
    assert best_place(rate, nbytes, saved, PRICES, there, margin) == there
    assert best_place(rate, nbytes, saved, {}, here, 0.0) in ("device", here)


@given(st.floats(1e-7, 1), st.floats(-0.04, 0.04))
def test_rates_that_waver_move_nothing_back(rate, wobble):
    saved = {"text": 0.0, **SAVED}
    place = best_place(rate, 10**6, saved, PRICES, "text", 0.2)
    assert best_place(rate * (1 + wobble), 10**6, saved, PRICES, place, 0.2) in (place, *SAVED)
    if place != "text":
        assert best_place(rate * (1 + wobble), 10**6, saved, PRICES, place, 0.2) != "text"


def test_the_paths_of_the_figure():
    by = {
        "text to KV": known(rate=1.0),
        "down": known("b", rate=1e-4, place="device"),
        "dropped": known("c", rate=0.0, place="disk"),
        "up": known("d", rate=1.0, place="disk", nbytes=10),
        "to an adapter": known("e", rate=1.0, unchanged_s=1e9, semantic_type="procedure"),
        "back to text": known("f", rate=1.0, adapted=True, stale=True, frozen=True),
        "frozen": known("g", rate=0.0, place="disk", frozen=True),
    }
    found = {(a.kind, *a.cube_ids): a for a in plan(list(by.values()), PRICES)}
    assert {(kind, name) for kind, name in found} == {
        ("encode", "a"), ("demote", "b"), ("drop", "c"), ("promote", "d"), ("encode", "e"), ("distil", "e"),
        ("decode", "f"),
    }  # fmt: skip
    assert found["distil", "e"].detail == {"source": "text", "gates": list(GATES)}
    values = [a.value for a in plan(list(by.values()), PRICES)]
    assert values == sorted(values, reverse=True)
    assert len(plan(list(by.values()), PRICES, TransformPolicy(most=2))) == 2


def test_only_memories_of_one_owner_that_mostly_meet_become_one_record():
    three = [known(name, rate=1.0, place="host") for name in "abc"]
    stranger = known("z", owner="bob", rate=1.0, place="host")
    own = {(n, n): 10.0 for n in "abcz"}
    chain = {**own, ("a", "b"): 9.0, ("b", "c"): 8.0, ("a", "c"): 1.0, ("a", "z"): 10.0}
    made = [a for a in plan([*three, stranger], {}, None, chain) if a.kind == "combine"]
    assert [a.cube_ids for a in made] == [("a", "b")]  # c meets b alone
    whole = {**chain, ("a", "c"): 9.0, ("b", "c"): 9.0}
    made = [a for a in plan([*three, stranger], {}, None, whole) if a.kind == "combine"]
    assert [a.cube_ids for a in made] == [("a", "b", "c")]
    assert not [a for a in plan(three, {"disk": 1.0}, None, whole) if a.kind == "combine"]


def test_a_phase_brings_its_set_up_and_sends_the_last_one_down():
    last = [known("a", place="host"), known("b", place="host"), known("t")]
    coming = [known("b", place="host"), known("c", place="disk"), known("u")]
    made = [(a.kind, a.cube_ids[0], a.detail["to"]) for a in swap(last, coming)]
    assert made == [("promote", "c", "host"), ("demote", "a", "disk")]


@pytest.mark.parametrize(
    "wrong", [{"half_life": 0.0}, {"margin": -1.0}, {"prior": math.nan}, {"phase": math.inf}]
)
def test_what_is_no_pace_is_refused(wrong):
    with pytest.raises(MemoryInputError):
        Pace(**wrong)
