"""The tiers: bounded to the byte, by value or least recently used first, one place for each record."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memos_engine.config import EVICTIONS, ConfigError, MemoryConfig
from memos_engine.decoder.record import KVRecord
from memos_engine.tiers import RecordTiers

BYTES = 128  # of a record of one token


class Moves:
    """Stands in for a device: remembers where a tensor was brought last."""

    def __init__(self):
        self.where: dict[int, str] = {}
        self.alive: list[torch.Tensor] = []

    def to(self, place):
        def move(tensor):
            other = tensor.clone()
            self.alive.append(other)
            self.where[id(other)] = place
            return other

        return lambda record: record.moved(move)

    def of(self, record):
        (place,) = {self.where.get(id(t), "disk") for t in record.tensors().values()}
        return place


def record(tokens=1, rank=None):
    k = torch.arange(16.0 * tokens).view(1, tokens, 1, 16)
    return KVRecord(k, -k, tuple(range(tokens)), "", "", rank=rank)


def tiers(host=4, device=2, eviction="lru"):
    moves = Moves()
    return RecordTiers(host * BYTES, device * BYTES, moves.to("device"), moves.to("host"), eviction), moves


def test_use_brings_a_record_up_and_others_down():
    both, moves = tiers(host=2, device=1)
    a, b = record(), record()
    first = both.put("a", a)
    assert (moves.of(first), first.serial) == ("device", a.serial)
    assert torch.equal(first.k, a.k)
    both.put("b", b)
    assert list(both.host.records) == ["a"]
    assert moves.of(both.host.records["a"]) == "host"
    again = both.get("a")
    assert (moves.of(again), again.serial) == ("device", a.serial)  # its pages are still found
    assert (list(both.device.records), list(both.host.records)) == (["a"], ["b"])
    both.put("c", record())
    both.put("d", record())
    assert (list(both.device.records), list(both.host.records)) == (["d"], ["a", "c"])
    assert both.get("b") is None  # its file is left
    both.drop("d")
    both.drop("a")
    assert (both.device.nbytes, both.host.nbytes) == (0, BYTES)
    both.clear()
    assert both.get("c") is None
    assert both.host.nbytes == 0


def test_what_does_not_fit_is_given_back_as_it_came():
    both, moves = tiers(host=3, device=2)
    middle, large = record(3), record(4)
    held = both.put("middle", middle)
    assert moves.of(held) == "host"
    assert both.get("middle") is held  # pinned once
    assert both.put("large", large) is large
    assert both.get("large") is None
    assert list(both.host.records) == ["middle"]


def test_without_a_device_there_is_one_tier_and_no_copy():
    config = MemoryConfig(host_bytes=2 * BYTES, eviction="lru")
    host = RecordTiers.beside(torch.device("cpu"), config)
    first = record()
    assert host.put("a", first) is first
    assert host.get("a") is first
    host.put("b", record())
    host.get("a")
    host.put("c", record())
    assert list(host.host.records) == ["a", "c"]
    assert host.device.nbytes == 0
    with pytest.raises(ConfigError, match="device_bytes"):
        MemoryConfig(device_bytes=-1)
    with pytest.raises(ConfigError, match="value, lru"):
        MemoryConfig(eviction="fifo")


def test_a_record_that_is_used_again_and_again_outlives_many_that_are_read_once():
    kept = {}
    for eviction in ("value", "lru"):
        both, _ = tiers(host=4, device=0, eviction=eviction)
        for i in range(60):
            name = f"hot {i // 2 % 2}" if i % 2 else f"once {i}"
            if both.get(name) is None:
                both.put(name, record(2))
        kept[eviction] = sum(name.startswith("hot") for name in both.host.records)
        assert both.occupancy()["host"]["nbytes"] == 4 * BYTES
    assert kept == {"value": 2, "lru": 1}


def test_a_record_that_is_worth_less_than_what_it_would_push_out_goes_past_the_tier():
    both, moves = tiers(host=1, device=1, eviction="value")
    both.put("hot", record())
    for _ in range(9):
        both.get("hot")
    held = both.put("once", record())
    assert (moves.of(held), both.holds("hot"), both.holds("once")) == ("host", "device", "host")
    assert (both.demote("hot"), both.holds("once")) == ("host", "disk")
    assert both.demote("hot") == both.demote("hot") == "disk"


def test_a_device_that_fails_takes_nothing_from_those_that_are_there():
    def broken(record):
        raise RuntimeError("out of memory")

    both, _ = tiers(host=2, device=2, eviction="value")
    both.put("a", record())
    both._to_device = broken
    with pytest.raises(RuntimeError):
        both.put("b", record(2))
    assert both.holds("a") == "device"
    assert both.device.nbytes == BYTES


operations = st.tuples(
    st.sampled_from(["put", "put", "get", "get", "drop"]), st.sampled_from("abcde"), st.integers(1, 4)
)


@given(st.lists(operations, max_size=60), st.integers(0, 6), st.integers(0, 5), st.sampled_from(EVICTIONS))
def test_bytes_are_exact_whatever_happens(todo, host, device, eviction):
    both, moves = tiers(host, device, eviction)
    latest: dict[str, KVRecord] = {}
    for what, key, tokens in todo:
        if what == "put":
            latest[key] = record(tokens, torch.zeros(tokens) if tokens > 2 else None)
            both.put(key, latest[key])
        elif what == "drop":
            both.drop(key)
        else:
            found = both.get(key)
            assert found is None or found.serial == latest[key].serial
        for name, tier in (("device", both.device), ("host", both.host)):
            assert tier.nbytes == sum(r.nbytes for r in tier.records.values()) <= tier.most
            assert {moves.of(r) for r in tier.records.values()} <= {name}
        assert not set(both.device.records) & set(both.host.records)


def test_many_threads():
    both, _ = tiers(host=6, device=3)
    keys = "abcdefghijkl"

    def work(seed):
        for i in range(200):
            key = keys[(seed * 7 + i * i) % len(keys)]
            if both.get(key) is None:
                both.put(key, record(1 + i % 3))
            if i % 17 == 0:
                both.drop(key)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    for tier in (both.device, both.host):
        assert tier.nbytes == sum(r.nbytes for r in tier.records.values()) <= tier.most
