from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memos_engine.errors import LifecycleError, MemoryInputError
from memos_engine.memory.cube import (
    ORIGINS,
    CubeIds,
    MemCube,
    is_cube_id,
    time_from_text,
    time_to_text,
    validate_tags,
    validate_text,
)
from memos_engine.memory.governance import Principal
from memos_engine.memory.lifecycle import LIVE, MOVES, LifecycleState, check_move

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=timezone.utc)
texts = st.text(min_size=1, max_size=200).filter(lambda t: t.strip() and "\0" not in t)
times = st.datetimes(timezones=st.just(timezone.utc))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (None, "str"),
        (b"bytes", "bytes"),
        ("", "empty"),
        (" \t\n\u3000", "empty"),
        ("a\0b", "index 1"),
        ("ab\ud800", "index 2"),
        ("x" * 1_000_001, "1,000,001"),
    ],
)
def test_bad_texts_are_refused_with_advice(text: object, word: str) -> None:
    with pytest.raises(MemoryInputError, match=word):
        validate_text(text)


@given(texts)
def test_good_texts_pass_unchanged(text: str) -> None:
    assert validate_text(text) is text


def test_the_longest_text_passes() -> None:
    assert validate_text("\U0001f600" * 1_000_000)


def test_tags() -> None:
    assert validate_tags(["b", "a", "b"]) == ("b", "a")
    for bad in ("one string", [""], ["x" * 129], ["a\0"], [str(i) for i in range(65)], [3]):
        with pytest.raises(MemoryInputError):
            validate_tags(bad)  # type: ignore[arg-type]


cubes = st.builds(
    MemCube,
    id=st.integers(0, 10**9).map(lambda n: CubeIds(lambda k: n.to_bytes(k, "big")).new(NOW)),
    provenance_id=st.just(CubeIds().new(NOW)),
    owner=st.builds(Principal, st.sampled_from(["t", "Ünï"]), st.sampled_from(["u", "用户"])),
    kind=st.sampled_from(["text", "kv", "lora"]),
    body=st.none() | texts,
    version=st.integers(1, 10),
    state=st.sampled_from(LifecycleState),
    created_at=times,
    updated_at=times,
    origin=st.sampled_from(ORIGINS),
    semantic_type=st.sampled_from(["fact", "preference"]),
    tags=st.lists(texts.filter(lambda t: len(t) <= 128), unique=True, max_size=4).map(tuple),
    priority=st.integers(-5, 5),
    ttl_at=st.none() | times,
    uses=st.integers(0, 9),
    last_used_at=st.none() | times,
)


@given(cubes)
def test_a_cube_survives_json(cube: MemCube) -> None:
    assert MemCube.from_dict(json.loads(json.dumps(cube.to_dict()))) == cube


@given(cubes, st.data())
def test_damaged_dicts_are_refused(cube: MemCube, data: st.DataObject) -> None:
    damaged = cube.to_dict()
    groups = [damaged, damaged["descriptive"], damaged["governance"], damaged["behavioural"]]
    group = data.draw(st.sampled_from(groups))
    key = data.draw(st.sampled_from(sorted(group)))
    if data.draw(st.booleans()):
        del group[key]
    else:
        group[key] = data.draw(st.sampled_from([object(), -1.5, b"x", ["", 3]]))
    with pytest.raises(MemoryInputError):
        MemCube.from_dict(damaged)


def test_ids_sort_by_creation_even_when_the_clock_steps_back() -> None:
    ids = CubeIds()
    moments = [NOW] * 5000 + [NOW - timedelta(hours=1)] * 10 + [NOW + timedelta(days=1)]
    made = [ids.new(moment) for moment in moments]
    assert made == sorted(set(made))
    assert all(is_cube_id(one) for one in made)


@given(times, times)
def test_times_sort_as_texts_and_return(a: datetime, b: datetime) -> None:
    assert time_from_text(time_to_text(a)) == a
    assert (time_to_text(a) < time_to_text(b)) == (a < b)


def test_naive_times_are_refused() -> None:
    with pytest.raises(MemoryInputError):
        time_to_text(datetime(2026, 1, 1))
    for bad in ("2026-01-01T00:00:00", "yesterday", None):
        with pytest.raises(MemoryInputError):
            time_from_text(bad)  # type: ignore[arg-type]


def test_the_lifecycle_table_is_the_documented_one() -> None:
    s = LifecycleState
    assert set(MOVES) == {None, *s}
    legal = {(a, b) for a, targets in MOVES.items() for b in targets}
    assert {b for a, b in legal if a is None} == {s.GENERATED}
    assert not any(a is s.EXPIRED for a, _ in legal)
    assert {a for a, b in legal if b is s.ARCHIVED} == {s.GENERATED, s.ACTIVATED, s.MERGED}
    assert {b for a, b in legal if a is s.ARCHIVED} == {s.ACTIVATED, s.EXPIRED}
    assert {a for a, b in legal if b is s.FROZEN} == LIVE - {s.FROZEN} == MOVES[s.FROZEN]


@pytest.mark.parametrize("source", [None, *LifecycleState])
@pytest.mark.parametrize("target", list(LifecycleState))
def test_moves_are_checked_and_the_message_names_the_legal_ones(
    source: LifecycleState | None, target: LifecycleState
) -> None:
    if target in MOVES[source]:
        check_move(source, target)
        return
    with pytest.raises(LifecycleError) as caught:
        check_move(source, target)
    assert all(state.value in str(caught.value) for state in MOVES[source])
