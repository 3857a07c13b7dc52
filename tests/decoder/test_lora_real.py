"""Adapters on the real SmolLM2-135M, against PEFT; and over weights of eight bits."""

from __future__ import annotations

import copy
import statistics

import pytest
import torch

from memos_engine.config import DecoderConfig
from memos_engine.decoder.adapter import PROJECTIONS, LowRank
from memos_engine.decoder.adapter_record import made
from memos_engine.decoder.adapters import AdapterBinding
from memos_engine.decoder.engine import DecoderEngine
from memos_engine.decoder.sequence import TextSpan
from memos_engine.decoder.spec import ModelSpec
from memos_engine.decoder.weights import Weights
from memos_engine.ops import backend_for, reference

MODULE = {n: f"{'self_attn' if n in 'qkvo' else 'mlp'}.{n}_proj" for n in PROJECTIONS}
PROMPT, PROMPT_SMALL = list(range(1000, 1040)), list(range(1, 40))


def adapter_for(weights, seed, rank=8, size=0.05, dtype=torch.bfloat16):
    make = torch.Generator().manual_seed(seed)
    modules = {}
    for layer, parts in enumerate(weights.layers):
        for name in PROJECTIONS:
            outputs, inputs = getattr(parts, name).shape
            a = torch.randn(rank, inputs, generator=make) / inputs**0.5
            b = torch.randn(outputs, rank, generator=make) * size
            modules[layer, name] = LowRank(a.to(dtype), b.to(dtype), 2.0)
    return made(modules)


def logits(engine, prompt, adapter):
    """Of the prompt and of one decoded token."""
    engine.forget_prefixes()
    binding = None if adapter is None else AdapterBinding(adapter)
    seq = engine.add_request([TextSpan(tuple(prompt))], sampled=False, adapter=binding)
    found = []
    for token in (7, None):
        while seq.logits is None and seq.error is None:
            engine.step()
        assert seq.error is None
        found.append(seq.logits.clone())
        if token is not None:
            engine.feed(seq, token)
    engine.finish(seq)
    return torch.stack(found).double()


def error(a, b):
    return float((a - b).norm() / b.norm())


def with_peft(model, adapter):
    peft = pytest.importorskip("peft", reason="peft is not installed: nothing compares adapters with it")
    config = peft.LoraConfig(
        r=adapter.rank, lora_alpha=2 * adapter.rank, target_modules=[f"{n}_proj" for n in PROJECTIONS]
    )
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    layers = wrapped.base_model.model.model.layers
    for (layer, name), module in adapter.modules.items():
        target = layers[layer].get_submodule(MODULE[name])
        target.lora_A["default"].weight.data = module.a.to(target.weight.dtype)
        target.lora_B["default"].weight.data = module.b.to(target.weight.dtype)
    return wrapped.eval()


def theirs(model, prompt):
    """As `logits`; both rows in one forward."""
    with torch.inference_mode():
        return model(torch.tensor([[*prompt, 7]])).logits[0, -2:].double()


def prompts(count):
    make = torch.Generator().manual_seed(5)
    return [torch.randint(100, 40_000, (40,), generator=make).tolist() for _ in range(count)]


@pytest.mark.smollm2
def test_float32_of_the_real_model_is_pefts(smollm2_path):
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32).eval()
    spec = ModelSpec.from_config(hf.config, type(hf).__name__)
    weights = Weights.from_model(copy.deepcopy(hf), spec)
    one = adapter_for(weights, 1, dtype=torch.float32)
    engine = DecoderEngine(spec, weights, DecoderConfig(dtype="float32"))
    unmerged = with_peft(copy.deepcopy(hf), one)
    merged = with_peft(hf, one).merge_and_unload()
    ours = [(prompt, logits(engine, prompt, one)) for prompt in prompts(6)]
    worst = {
        name: max(error(found, theirs(model, prompt)) for prompt, found in ours)
        for name, model in (("unmerged", unmerged), ("merged", merged))
    }
    print(f"worst of {len(ours)} prompts: {worst}")
    assert max(worst.values()) <= 1e-5


@pytest.mark.smollm2
def test_bfloat16_of_the_real_model_is_pefts(smollm2_path):
    """Truth is PEFT in float32 on the same rounded numbers; one prompt is mostly bfloat16's own noise,
    so medians are compared. Seen: docs/parameter-memory.md."""
    from transformers import AutoModelForCausalLM

    short = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.bfloat16).eval()
    spec = ModelSpec.from_config(short.config, type(short).__name__)
    weights = Weights.from_model(copy.deepcopy(short), spec)
    one, two = adapter_for(weights, 1), adapter_for(weights, 2, 16)
    engine = DecoderEngine(spec, weights, DecoderConfig(dtype="bfloat16"))
    ours = logits(engine, PROMPT, one)
    swapped = logits(engine, PROMPT, two)
    assert torch.equal(logits(engine, PROMPT, one), ours)  # A, B, A
    for digest in engine.adapters.resident():
        engine.adapters.evict(digest)
    assert torch.equal(logits(engine, PROMPT, one), ours)
    assert error(swapped, ours) > 0.05
    plain = copy.deepcopy(short).float()
    truth = with_peft(copy.deepcopy(plain), one)
    unmerged = with_peft(copy.deepcopy(short), one)
    merged = with_peft(copy.deepcopy(short), one).merge_and_unload()
    errors: dict[str, list[float]] = {}
    for prompt in prompts(24):
        right, base = theirs(truth, prompt), theirs(plain, prompt)
        for name, found, wanted in (
            ("ours", logits(engine, prompt, one), right),
            ("unmerged", theirs(unmerged, prompt), right),
            ("merged", theirs(merged, prompt), right),
            ("ours, no adapter", logits(engine, prompt, None), base),
            ("transformers, no adapter", theirs(short, prompt), base),
            ("what the adapter changes", base, right),
        ):
            errors.setdefault(name, []).append(error(found, wanted))
    middle = {name: statistics.median(seen) for name, seen in errors.items()}
    for name, seen in errors.items():
        print(f"{name}: median {middle[name]:.2e}, worst {max(seen):.2e}")
    noise = max(middle["unmerged"], middle["merged"])
    assert middle["what the adapter changes"] > 4 * noise
    assert middle["ours"] <= max(1e-2, noise)


@pytest.mark.skipif(backend_for("cpu") is reference, reason="native code was not built")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_over_weights_of_eight_bits_deltas_stay_whole(tiny_llama, dtype):
    """Decoded tokens: the base is rounded, the delta is not."""
    model = tiny_llama(seed=1).to(getattr(torch, dtype))
    spec = ModelSpec.from_config(model.config, type(model).__name__)
    weights = Weights.from_model(model, spec)
    one = adapter_for(weights, 1, size=0.3, dtype=getattr(torch, dtype))
    whole = DecoderEngine(spec, weights, DecoderConfig(dtype=dtype))
    narrow = DecoderEngine(spec, weights, DecoderConfig(dtype=dtype, int8_decode=True))
    expected, got, base = (
        logits(whole, PROMPT_SMALL, one),
        logits(narrow, PROMPT_SMALL, one),
        logits(narrow, PROMPT_SMALL, None),
    )
    assert error(got[1], expected[1]) < 0.1
    assert error(base[1], expected[1]) > 0.3
    assert torch.equal(logits(narrow, PROMPT_SMALL, one), got)
