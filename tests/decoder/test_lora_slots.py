"""AdapterSlots: a state machine over all that may happen to them, threads that swap, stored adapters."""

from __future__ import annotations

import json
import threading
from collections import Counter

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from memos_engine.config import DecoderConfig
from memos_engine.decoder.adapter import LowRank, PackedModules
from memos_engine.decoder.adapter_record import decode_adapter, encode_adapter, made
from memos_engine.decoder.adapters import AdapterBinding, AdapterSlots
from memos_engine.decoder.engine import DecoderEngine
from memos_engine.decoder.sequence import TextSpan
from memos_engine.decoder.spec import ModelSpec
from memos_engine.decoder.weights import Weights
from memos_engine.errors import AdapterError, AdapterInUseError

SIZES = {"q": (64, 48), "k": (32, 48), "o": (48, 64), "gate": (80, 48), "down": (48, 80)}
PROMPT = tuple(range(1, 40))


def adapter(seed, rank=4, layers=(0, 2), dtype=torch.float32):
    make = torch.Generator().manual_seed(seed)
    modules = {}
    for layer in layers:
        for name, (outputs, inputs) in SIZES.items():
            a, b = (torch.randn(s, generator=make) * 0.2 for s in ((rank, inputs), (outputs, rank)))
            modules[layer, name] = LowRank(a.to(dtype), b.to(dtype), 0.5)
    return made(modules)


def stored(one):
    """As the vault gives it back."""
    return decode_adapter(memoryview(bytearray(encode_adapter(one))), one.digest, whole=True)


@pytest.fixture(scope="module")
def parts(tiny_llama):
    model = tiny_llama()
    spec = ModelSpec.from_config(model.config, type(model).__name__)
    return spec, Weights.from_model(model, spec)


def engine_for(parts):
    return DecoderEngine(*parts, DecoderConfig())


def answer(engine, binding, steps=3):
    """Logits of a few greedy tokens."""
    engine.forget_prefixes()
    seq = engine.add_request([TextSpan(PROMPT)], sampled=False, adapter=binding)
    found = []
    for _ in range(steps):
        while seq.logits is None and seq.error is None:
            engine.step()
        assert seq.error is None, seq.error
        found.append(seq.logits.clone())
        engine.feed(seq, int(seq.logits.argmax()))
    engine.finish(seq)
    return torch.stack(found)


class Slots(RuleBasedStateMachine):
    """Beside a plain model: which are resident, pinned and used. Few slots, room for three or four."""

    POOL = tuple(adapter(i, 2 + i, layers=(0,)) for i in range(6))
    spec: ModelSpec
    weights: Weights

    def __init__(self):
        super().__init__()
        one = AdapterSlots(self.spec, self.weights)
        one.prefetch(self.POOL[5])
        self.slots = AdapterSlots(self.spec, self.weights, slots=3, max_rank=8, max_bytes=3 * one.nbytes)
        self.users, self.pinned, self.seen = Counter(), set(), {}

    which = st.integers(0, 5).map(lambda i: Slots.POOL[i])

    def known(self, digest):
        return digest in self.slots.resident()

    @rule(one=which, packed=st.booleans())
    def prefetch(self, one, packed):
        try:
            self.slots.prefetch(stored(one) if packed else one)
        except AdapterError:
            assert self.pinned or self.users
            assert not self.known(one.digest)
        else:
            assert self.known(one.digest)

    @rule(one=which)
    def acquire(self, one):
        try:
            slot = self.slots.acquire(one)
        except AdapterError:  # bytes, or all slots, are taken
            assert self.pinned or self.users
        else:
            self.users[one.digest] += 1
            assert self.slots.table.fills[slot] is self.slots._resident[one.digest].fill

    @rule(one=which)
    def release(self, one):
        if self.users[one.digest]:
            self.users[one.digest] -= 1
            self.users += Counter()
            self.slots.release(one.digest)

    @rule(one=which, on=st.booleans())
    def pin(self, one, on):
        if self.known(one.digest):
            self.slots.pin(one.digest, on)
            (self.pinned.add if on else self.pinned.discard)(one.digest)

    @rule(one=which)
    def evict(self, one):
        if not self.known(one.digest):
            with pytest.raises(AdapterError, match="not resident"):
                self.slots.evict(one.digest)
        elif self.users[one.digest]:
            with pytest.raises(AdapterInUseError, match="is used by"):
                self.slots.evict(one.digest)
        else:
            self.slots.evict(one.digest)
            self.pinned.discard(one.digest)

    @invariant()
    def holds(self):
        slots = self.slots
        resident = set(slots.resident())
        assert self.pinned <= resident
        assert set(self.users) <= resident
        assert slots.nbytes + sum(spare.nbytes for spare in slots._spare) <= slots.max_bytes
        assert not any(spare.any() for spare in slots._spare)
        assert {d: r.users for d, r in slots._resident.items() if r.users} == dict(self.users)
        for digest, found in slots._resident.items():
            self.seen[digest, id(found.fill)] = found.fill
            if self.users[digest]:
                assert found.slot >= 0
        used = {found.fill.buffer.data_ptr() for found in slots._resident.values()}
        assert len(used) == len(resident)
        for (digest, at), fill in self.seen.items():
            if digest not in resident or id(slots._resident[digest].fill) != at:
                assert fill.buffer.data_ptr() in used or not fill.buffer.any()
                assert not fill.words.any()
        published = {r.slot: r.fill for r in slots._resident.values() if r.slot >= 0}
        for slot, address in enumerate(slots.table.pointers.tolist()):
            fill = published.get(slot)
            assert slots.table.fills[slot] is fill
            assert address == (0 if fill is None else fill.words.data_ptr())


def test_slots_under_everything_that_may_happen(parts):
    class Machine(Slots):
        spec, weights = parts

    Machine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
    Machine.TestCase().runTest()


def test_a_stored_adapter_is_the_same_bits(parts):
    engine = engine_for(parts)
    for dtype in (torch.float32, torch.bfloat16):
        one = adapter(3, 5, dtype=dtype)
        again = stored(one)
        assert isinstance(again.modules, PackedModules)
        assert (again.rank, again.nbytes, again.kv_floor) == (one.rank, one.nbytes, one.kv_floor)
        plain = answer(engine, AdapterBinding(one))
        engine.adapters.evict(one.digest)
        assert torch.equal(answer(engine, AdapterBinding(again)), plain)
        engine.adapters.evict(one.digest)


def test_modules_of_several_dtypes_are_stored_as_they_are(parts):
    mixed = made({**adapter(1).modules, (0, "q"): adapter(2, dtype=torch.bfloat16).modules[0, "q"]})
    again = stored(mixed)
    assert again.modules.keys() == mixed.modules.keys()
    assert again.modules[0, "q"].a.dtype == torch.bfloat16
    engine = engine_for(parts)
    plain = answer(engine, AdapterBinding(mixed))
    engine.adapters.evict(mixed.digest)
    assert torch.equal(answer(engine, AdapterBinding(again)), plain)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_no_number_that_is_none_enters_a_slot(parts, bad):
    """3e38 is one in float32 and none in the float16 of the slots."""
    spec, weights = parts
    one = stored(adapter(1, dtype=torch.float32))
    one.modules.flat[-7] = bad
    slots = AdapterSlots(spec, weights)
    if bad == 3e38:
        slots.dtype = torch.float16
    with pytest.raises(AdapterError, match="NaN or infinity"):
        slots.prefetch(one)
    assert slots.resident() == []


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop(),
        lambda m: m.append(m[0]),
        lambda m: m[0].__setitem__(3, 1 << 40),
        lambda m: m[0].__setitem__(1, -1),
        lambda m: m[0].__setitem__(2, "lm_head"),
        lambda m: m[0].__setitem__(0, "F16"),
        lambda m: m[0].__setitem__(5, "48; drop"),
        lambda m: m[0].__setitem__(6, 1e300),
        lambda m: m[0].pop(),
    ],
)
def test_a_header_that_lies_is_refused(change):
    from safetensors.torch import load, save

    one = adapter(1)
    data = encode_adapter(one)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["memos_engine"])
    change(header["modules"])
    forged = save(load(data), metadata={"memos_engine": json.dumps(header)})
    with pytest.raises(AdapterError, match="damaged"):
        decode_adapter(memoryview(bytearray(forged)), one.digest)


def test_rows_are_made_anew_when_they_change(parts):
    """What a step keeps for the next must not outlive a change of adapter, scale, offset or batch."""
    engine = engine_for(parts)
    one, two = adapter(1), adapter(2)
    bindings = [AdapterBinding(one), AdapterBinding(two), AdapterBinding(one, 0.25), None]
    bindings += [AdapterBinding(one, 1.0, len(PROMPT) + 1)]  # acts from the third token on
    alone = [answer(engine_for(parts), b) for b in bindings]
    for binding, expected in zip([*bindings, *bindings[::-1]], [*alone, *alone[::-1]], strict=True):
        assert torch.equal(answer(engine, binding), expected)
    assert torch.equal(alone[3][:2], alone[4][:2])
    assert not torch.equal(alone[3][2], alone[4][2])


def test_threads_that_swap_disturb_no_request(parts):
    """One thread answers, others fill, publish, pin and evict; slots are few, so that they change hands."""
    engine = engine_for(parts)
    engine.adapters = AdapterSlots(*parts, slots=3)
    engine.runner.adapters = engine.adapters.table
    mine = AdapterBinding(adapter(1))
    expected = answer(engine, mine)
    stop, failures = threading.Event(), []

    def swap(seed):
        own = [stored(adapter(seed + i)) for i in range(3)]
        while not stop.is_set():
            for one in own:
                try:
                    engine.adapters.acquire(one)
                    engine.adapters.release(one.digest)
                    engine.adapters.evict(one.digest)
                except AdapterInUseError:
                    continue
                except Exception as error:
                    failures.append(error)
                    return

    threads = [threading.Thread(target=swap, args=(seed,)) for seed in (10, 20)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            assert torch.equal(answer(engine, mine), expected)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []


def test_other_weights_find_no_adapters_but_those_in_use(parts):
    spec, weights = parts
    engine = engine_for(parts)
    used, idle = adapter(1), adapter(2)
    seq = engine.add_request([TextSpan(PROMPT)], sampled=False, adapter=AdapterBinding(used))
    engine.adapters.prefetch(idle)
    engine.adapters.pin(idle.digest)
    short = Weights({name: t.bfloat16() for name, t in weights.tensors.items()}, spec)
    with pytest.raises(AdapterInUseError, match="have to wait"):
        engine.use_weights(short)
    assert set(engine.adapters.resident()) == {used.digest, idle.digest}
    assert engine.runner.model.weights is weights
    engine.use_weights(weights)
    assert engine.adapters.resident() == [used.digest]
    while seq.logits is None and seq.error is None:
        engine.step()
    assert seq.error is None
    engine.finish(seq)
