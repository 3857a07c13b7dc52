"""Adapters in the decoder: against PEFT, in mixed batches, behind an offset, and in the prefix cache."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from memos_engine.config import DecoderConfig, SamplingParams
from memos_engine.decoder.adapter import Adapter, LowRank
from memos_engine.decoder.adapters import AdapterBinding
from memos_engine.decoder.engine import DecoderEngine
from memos_engine.decoder.record import KVRecord
from memos_engine.decoder.sequence import KVSpan, TextSpan
from memos_engine.decoder.spec import ModelSpec
from memos_engine.decoder.weights import Weights
from memos_engine.errors import AdapterError, AdapterInUseError, MemoryInputError

SIZES = {"q": (64, 48), "k": (32, 48), "v": (32, 48), "o": (48, 64)}
SIZES |= {"gate": (80, 48), "up": (80, 48), "down": (48, 80)}
MODULE = {name: f"self_attn.{name}_proj" for name in "qkvo"}
MODULE |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
PROMPT = [1, *range(5, 50)]


def adapter(seed=0, rank=8, names=tuple(SIZES), layers=(0, 1, 2), scale=0.5):
    make = torch.Generator().manual_seed(seed)
    modules = {}
    for layer in layers:
        for name in names:
            outputs, inputs = SIZES[name]
            a = torch.randn(rank, inputs, generator=make) / inputs**0.5
            modules[layer, name] = LowRank(a, torch.randn(outputs, rank, generator=make) * 0.2, scale)
    return Adapter(f"digest-{seed}-{rank}-{'-'.join(names)}-{layers}-{scale}", modules)


@pytest.fixture(scope="module")
def hf(tiny_llama):
    return tiny_llama()


def engine_for(hf, dtype=torch.float32, **options):
    model = hf.to(dtype)
    spec = ModelSpec.from_config(model.config, type(model).__name__)
    return DecoderEngine(spec, Weights.from_model(model, spec), DecoderConfig(**options))


@pytest.fixture
def engine(hf):
    return engine_for(hf)


def bind(made, scale=1.0, active_from=0, **options):
    return AdapterBinding(made, scale, active_from, **options)


def logits(engine, prompts, bindings, steps=3):
    """Logits of `steps` greedy tokens of each request, all in one batch."""
    seqs = [
        engine.add_request([TextSpan(tuple(p))], sampled=False, adapter=b)
        for p, b in zip(prompts, bindings, strict=True)
    ]
    found = [[] for _ in seqs]
    for _ in range(steps):
        while any(s.logits is None and s.error is None for s in seqs):
            engine.step()
        for seq, mine in zip(seqs, found, strict=True):
            assert seq.error is None, seq.error
            mine.append(seq.logits.clone())
            engine.feed(seq, int(seq.logits.argmax()))
    for seq in seqs:
        engine.finish(seq)
    return [torch.stack(mine) for mine in found]


def error(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def with_peft(hf, made, rslora=False):
    peft = pytest.importorskip("peft", reason="peft is not installed: nothing compares adapters with it")
    import copy

    rank = made.rank
    factor = rank**0.5 if rslora else rank
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=next(iter(made.modules.values())).scale * factor,
        use_rslora=rslora,
        target_modules=[f"{n}_proj" for n in {name for _, name in made.modules}],
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(copy.deepcopy(hf), config)
    layers = model.base_model.model.model.layers
    for (layer, name), module in made.modules.items():
        target = layers[layer].get_submodule(MODULE[name])
        target.lora_A["default"].weight.data.copy_(module.a)
        target.lora_B["default"].weight.data.copy_(module.b)
    return model.eval()


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_logits_are_pefts(tiny_llama, rslora):
    """Prefill and decode, against PEFT unmerged and merged."""
    made = adapter(1, rank=8, scale=0.25)
    unmerged = with_peft(tiny_llama(), made, rslora)
    merged = with_peft(tiny_llama(), made, rslora).merge_and_unload()
    base = tiny_llama()
    (ours,) = logits(engine_for(tiny_llama()), [PROMPT], [bind(made)])
    ids = list(PROMPT)
    for mine in ours:
        one, two, none = (peft_logits(m, ids) for m in (unmerged, merged, base))
        assert error(mine, one) <= 1e-5
        assert error(mine, two) <= 1e-5
        assert error(none, one) > 0.1  # the adapter matters
        ids.append(int(mine.argmax()))


def peft_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].float()


def test_bfloat16_is_within_pefts_own_rounding(tiny_llama):
    """Of a model with activations of ordinary size. The noise floor: PEFT in bfloat16 against itself in
    float32, on the same rounded numbers."""

    def calm():
        model = tiny_llama()
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data.mul_(0.3)
        return model.bfloat16()

    made = adapter(1, rank=8, scale=0.25)
    rounded = {k: LowRank(m.a.bfloat16(), m.b.bfloat16(), m.scale) for k, m in made.modules.items()}
    made = Adapter(made.digest, rounded)
    (ours,) = logits(engine_for(calm(), torch.bfloat16), [PROMPT], [bind(made)], steps=1)
    truth = peft_logits(with_peft(calm().float(), made), PROMPT)
    noise = error(peft_logits(with_peft(calm(), made).bfloat16(), PROMPT), truth)
    print(f"ours {error(ours[0], truth):.2e}, noise floor {noise:.2e}")
    assert error(ours[0], truth) <= max(1e-2, 1.2 * noise)


@pytest.mark.parametrize("stack", [True, False], ids=["stack", "ops"])
def test_a_mixed_batch_is_its_requests_one_by_one(hf, stack):
    bindings = [None, bind(adapter(1, 4)), bind(adapter(2, 64, names=("gate", "up", "down"))), None]
    bindings += [bind(adapter(3, 16, names=("q", "v")), 0.7, 20), bind(adapter(1, 4), -0.5)]
    prompts = [[1, *range(5 + i, 30 + 3 * i)] for i in range(len(bindings))]
    engine = engine_for(hf)
    if not stack:
        engine.runner.model._layer_stack = lambda *_: None
    together = logits(engine, prompts, bindings)
    for prompt, binding, mine in zip(prompts, bindings, together, strict=True):
        engine.forget_prefixes()
        (alone,) = logits(engine, [prompt], [binding])
        assert error(mine, alone) < 1e-5
    engine.check_integrity()


def test_swaps_leave_no_trace(engine):
    a, b = bind(adapter(1)), bind(adapter(2, 16))
    outcomes = []
    for binding in (a, b, a, None, a):
        engine.forget_prefixes()
        outcomes.append(logits(engine, [PROMPT], [binding])[0])
        for digest in engine.adapters.resident():
            engine.adapters.evict(digest)
    assert torch.equal(outcomes[0], outcomes[2])
    assert torch.equal(outcomes[0], outcomes[4])
    assert not torch.equal(outcomes[0], outcomes[3])


def test_an_adapter_of_zeros_is_the_base_bit_for_bit(engine):
    made = adapter(1)
    zero = {key: dataclasses.replace(m, b=torch.zeros_like(m.b)) for key, m in made.modules.items()}
    (ours,) = logits(engine, [PROMPT], [bind(Adapter("zeros", zero))])
    engine.forget_prefixes()
    (base,) = logits(engine, [PROMPT], [None])
    assert torch.equal(ours, base)


def kv_of(engine, binding, tokens=PROMPT):
    seq = engine.add_request([TextSpan(tuple(tokens))], sampled=False, adapter=binding)
    while seq.logits is None:
        engine.step()
    cache, page = engine.runner.cache, engine.pool.page
    rows = [(seq.blocks[p // page], p % page) for p in range(len(tokens))]
    k = torch.stack([cache.k[:, block, at] for block, at in rows], dim=1)
    engine.finish(seq)
    return k, seq


def test_before_active_from_the_base_stands_bit_for_bit(engine):
    base, _ = kv_of(engine, None)
    engine.forget_prefixes()
    adapted, _ = kv_of(engine, bind(adapter(1), active_from=20))
    assert torch.equal(base[:, :20], adapted[:, :20])
    assert not torch.equal(base[:, 20:], adapted[:, 20:])
    engine.forget_prefixes()
    late, _ = kv_of(engine, bind(adapter(1, names=("down",), layers=(1,))))
    assert torch.equal(base[:2], late[:2])  # kv_floor is 2
    assert not torch.equal(base[2], late[2])


def hits(engine, binding):
    return kv_of(engine, binding)[1].stats.prefix_tokens


def test_pages_are_shared_only_with_the_same_state(engine):
    one = adapter(1)
    assert hits(engine, None) == 0
    assert hits(engine, bind(one, active_from=20)) == 16  # the base's page before the adapter
    assert hits(engine, bind(one, active_from=20)) == 32
    assert hits(engine, bind(one, active_from=21)) == 16
    assert hits(engine, bind(one, 0.5, 20)) == 16
    assert hits(engine, bind(one)) == 0
    renewed = Adapter("other weights under the same name", one.modules)
    assert hits(engine, bind(renewed)) == 0
    assert hits(engine, None) == 32
    last = adapter(4, names=("gate", "down"), layers=(2,))  # no K or V changes
    assert hits(engine, bind(last)) == 32


def test_a_crafted_root_or_prompt_finds_no_adapters_pages(engine):
    binding = bind(adapter(1))
    hits(engine, binding)
    state = binding.state(3)
    for root in (state, b"adapter", state.hex().encode(), b"adapter" + state):
        seq = engine.add_request([TextSpan(tuple(PROMPT))], sampled=False, root=root)
        while seq.logits is None:
            engine.step()
        assert seq.stats.prefix_tokens == 0
        engine.abort(seq)


def record_of(engine, ids, left=(), state=""):
    from memos_engine.decoder.identity import ids_digest

    k, v = engine.encode_span(list(left), list(ids))
    header = {"identity_fields": {"adapters": [state] if state else []}}
    return KVRecord(k, v, tuple(ids), "identity", ids_digest(list(left)), header=header)


def test_stored_spans_under_an_active_adapter_are_refused_unless_asked_for(engine):
    record = record_of(engine, range(5, 40))
    spans = [KVSpan(record), TextSpan((50, 51, 52))]
    with pytest.raises(AdapterError, match="active_from"):
        engine.add_request(spans, adapter=bind(adapter(1)))
    with pytest.raises(AdapterError, match="positions 0 to 35"):
        engine.add_request(spans, adapter=bind(adapter(1), active_from=10))
    list(engine.generate(spans, SamplingParams(max_new_tokens=2), adapter=bind(adapter(1), active_from=35)))
    engine.forget_prefixes()
    loose = engine.add_request(spans, sampled=False, adapter=bind(adapter(1), approximate=True))
    while loose.logits is None:
        engine.step()
    assert loose.adapter_approximate
    assert loose.exact == 0
    engine.finish(loose)
    tokens = [*range(5, 40), 50, 51, 52]
    for binding in (None, bind(adapter(1))):
        assert kv_of(engine, binding, tokens)[1].stats.prefix_tokens == 0
        engine.forget_prefixes()


def test_a_record_of_an_adapter_is_not_the_bases(engine):
    binding = bind(adapter(1))
    record = record_of(engine, range(5, 40), state=binding.state(3).hex())
    spans = [KVSpan(record), TextSpan((50, 51))]
    with pytest.raises(AdapterError, match="was made under"):
        engine.add_request(spans)
    engine.abort(engine.add_request(spans, adapter=binding))
    with pytest.raises(AdapterError, match="was made under"):
        engine.add_request(spans, adapter=bind(adapter(1), scale=0.9))


def test_a_session_keeps_only_what_its_next_request_may_read(engine):
    session = engine.open_session()

    def ask(ids, binding):
        seq = engine.add_request([TextSpan(tuple(ids))], sampled=False, session=session, adapter=binding)
        while seq.logits is None:
            engine.step()
        engine.finish(seq)
        return seq

    ask(PROMPT, None)
    second = ask(range(60, 80), bind(adapter(1), active_from=len(PROMPT)))
    assert second.stats.adapter_miss or second.stats.prefix_tokens == 0 or second.stats.prefix_tokens >= 32
    third = ask(range(80, 90), None)
    assert "another adapter state" in third.stats.adapter_miss
    whole = [*PROMPT, *range(60, 80), *range(80, 90)]
    expected, _ = kv_of(engine_for_like(engine), None, whole)
    page = engine.pool.page
    rows = [(session.blocks[p // page], p % page) for p in range(len(whole))]
    got = torch.stack([engine.runner.cache.k[:, b, at] for b, at in rows], dim=1)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def engine_for_like(engine):
    return DecoderEngine(engine.spec, engine.runner.model.weights, engine.config)


def test_an_adapter_in_use_is_never_evicted(engine):
    made = adapter(1)
    seq = engine.add_request([TextSpan(tuple(PROMPT))], sampled=False, adapter=bind(made))
    with pytest.raises(AdapterInUseError, match="1 request"):
        engine.adapters.evict(made.digest)
    engine.adapters.max_bytes = engine.adapters.nbytes
    with pytest.raises(AdapterError, match="in use or pinned"):
        engine.add_request([TextSpan((1, 2))], adapter=bind(adapter(2)))
    while seq.logits is None:
        engine.step()
    engine.abort(seq)
    fill = engine.adapters._resident[made.digest].fill
    engine.adapters.acquire(adapter(2))  # takes the first one's place
    assert engine.adapters.resident() == [adapter(2).digest]
    assert torch.equal(
        fill.buffer, engine.adapters._resident[adapter(2).digest].fill.buffer
    )  # its memory too
    assert not fill.words.any()


def test_what_does_not_fit_is_refused_by_name(engine):
    good = adapter(1)
    key = (0, "q")
    for module, match in (
        (LowRank(torch.zeros(65, 48), torch.zeros(64, 65), 1.0), "rank 65"),
        (LowRank(torch.zeros(4, 47), torch.zeros(64, 4), 1.0), "another model"),
        (LowRank(torch.full((4, 48), torch.nan), torch.zeros(64, 4), 1.0), "NaN"),
        (LowRank(torch.zeros(4, 48), torch.zeros(64, 4), float("inf")), "NaN or infinity"),
    ):
        bad = Adapter("bad", {**good.modules, key: module})
        with pytest.raises(AdapterError, match=match):
            engine.add_request([TextSpan((1, 2))], adapter=bind(bad))
    with pytest.raises(AdapterError, match="not there"):
        engine.adapters.prefetch(Adapter("deep", {(3, "q"): good.modules[key]}))
    with pytest.raises(MemoryInputError, match="finite"):
        bind(good, float("nan"))
    with pytest.raises(MemoryInputError, match="position"):
        bind(good, active_from=-1)
    assert engine.adapters.resident() == []


def test_slots_run_out_and_come_back(engine):
    slots = engine.adapters
    held = []
    for i in range(len(slots.table.fills)):
        held.append(adapter(100 + i, 1, names=("q",), layers=(0,)))
        slots.acquire(held[-1])
    one_more = adapter(7, 1, names=("q",), layers=(0,))
    with pytest.raises(AdapterInUseError, match="slots are in use"):
        slots.acquire(one_more)
    slots.release(held[3].digest)
    assert slots.acquire(one_more) == 3


def test_spans_are_stored_as_the_base_computes_them(engine):
    """Under no adapter that changes K or V, whether its caller names it or another request runs under it."""
    left, span = list(range(1, 9)), list(range(20, 40))
    base = engine.encode_span(left, span)
    for binding in (bind(adapter(1)), bind(adapter(1), active_from=27), bind(adapter(1), approximate=True)):
        with pytest.raises(AdapterError, match=r"base model.*the span ends at 28.*active_from=28"):
            engine.encode_span(left, span, binding)
        with pytest.raises(AdapterError, match="the span ends at 28"):
            engine.encode_spans(left, [span[:3], span], binding)
    harmless = bind(adapter(1), active_from=28), bind(adapter(1), scale=0.0)
    for binding in (*harmless, bind(adapter(4, names=("gate", "down"), layers=(2,))), None):
        for mine, wanted in zip(engine.encode_span(left, span, binding), base, strict=True):
            assert torch.equal(mine, wanted)
        assert len(engine.encode_spans(left, [span[:3], span], binding)) == 2
    seq = engine.add_request([TextSpan(tuple(left + span))], sampled=False, adapter=bind(adapter(1)))
    while seq.logits is None:
        engine.step()
    for mine, wanted in zip(engine.encode_span(left, span), base, strict=True):
        assert torch.equal(mine, wanted)
    engine.abort(seq)
    engine.check_integrity()
    assert engine.encode_spans(left, [], bind(adapter(1), active_from=8)) == []
