"""What an adapter costs: milliseconds a decoded token beside the same engine without one, and swaps.

Adapters are random, of rank 16 on the MLP. Ours without, ours with (all requests with one of their own), ours
with for one request of the batch alone, and the peers take turns, step by step. `byte_bound_ms` is the
adapters' bytes over the read bandwidth, its median between the rounds: what reading them alone would take;
`extra_ms` is the median over rounds of what a step takes more than the two without in its round. PEFT is
measured for one request, where it is installed, beside the same model without it (`peft_none`). Swaps are of
an adapter on all projections: `cold` reads it from the vault (checksum, checks, one copy) into a slot,
`publish` puts one that is in memory into a slot.
"""

from __future__ import annotations

import importlib.util
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from memos_engine.bench.document import Document
from memos_engine.bench.options import Options, Progress, silent
from memos_engine.bench.roofline import _read
from memos_engine.bench.systems import OURS
from memos_engine.bench.target import Target, open_target, random_weights

from memos_engine.config import ConfigError, DecoderConfig
from memos_engine.decoder.adapter import PROJECTIONS, Adapter, LowRank
from memos_engine.decoder.adapter_record import decode_adapter, encode_adapter
from memos_engine.decoder.adapter_record import made as checked
from memos_engine.decoder.adapters import AdapterBinding
from memos_engine.decoder.engine import DecoderEngine
from memos_engine.decoder.sequence import Sequence, TextSpan
from memos_engine.decoder.weights import Weights
from memos_engine.memory.vault import MemVault

READ_EVERY = 20  # rounds: a neighbour of this machine may take half of its bandwidth for a minute
RANK, PARTS = 16, ("gate", "up", "down")
_PEFT = {n: f"{'self_attn' if n in 'qkvo' else 'mlp'}.{n}_proj" for n in PROJECTIONS}
Row = dict[str, Any]


def run(options: Options, progress: Progress = silent) -> dict[str, Any]:
    """The result document of `bench lora`."""
    if options.device != "cpu":
        raise ConfigError("bench lora measures the CPU so far; leave --device out.")
    document = Document("lora", options)
    if options.threads:
        torch.set_num_threads(options.threads)
    batches, contexts = options.batches or (1, 8), options.contexts or (1024,)
    with open_target(options) as target:
        dtype = getattr(torch, options.resolved_dtype)
        if target.random is None:
            weights = Weights.from_folder(target.folder, target.spec, dtype)
        else:
            weights = random_weights(target.spec, dtype, torch.device("cpu"))
        for context in contexts:
            for batch in batches:
                unit = f"{batch} requests behind {context} tokens"
                if not document.has(unit):
                    progress(unit, 0, 1)
                    document.add(unit, _decode(options, target, weights, context, batch))
        if not document.has("swaps"):
            progress("swaps", 0, 1)
            document.add("swaps", _swaps(options, target, weights))
    return document.finish()


def _adapter(weights: Weights, seed: int, names: tuple[str, ...] = PARTS) -> Adapter:
    make = torch.Generator().manual_seed(seed)
    modules = {}
    for layer, parts in enumerate(weights.layers):
        for name in names:
            outputs, inputs = getattr(parts, name).shape
            a, b = (torch.randn(s, generator=make) * 0.02 for s in ((RANK, inputs), (outputs, RANK)))
            modules[layer, name] = LowRank(a.to(weights.dtype), b.to(weights.dtype), 1.0)
    return Adapter(f"bench {seed}", modules)


def _decode(options: Options, target: Target, weights: Weights, context: int, batch: int) -> list[Row]:
    rounds = options.rounds(200, 8)
    target.window(context + rounds + 16)
    pool = 4 * batch * (context + rounds + 64)
    config = DecoderConfig(dtype=options.resolved_dtype, pool_tokens=pool, max_batch=max(32, batch))
    engine = DecoderEngine(target.spec, weights, config)
    adapters = [_adapter(weights, i) for i in range(batch)]
    steps: dict[str, Callable[[], None]] = {
        "none": _ours(engine, context, [None] * batch),
        "distinct": _ours(engine, context, [AdapterBinding(a) for a in adapters]),
    }
    users = {"none": 0, "distinct": batch}
    if batch > 1:
        steps["one_of_batch"] = _ours(engine, context, [AdapterBinding(adapters[0]), *[None] * (batch - 1)])
        users["one_of_batch"] = 1
    # Again, with adapters resident: what it differs by is what the clock itself makes of equal steps.
    steps["none_again"] = _ours(engine, context, [None] * batch)
    users["none_again"] = 0
    if batch == 1 and _wanted(options):
        steps |= _peft_steps(target, weights, adapters[0], context)
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps.items()), random.Random(options.seed).shuffle
    bandwidth: list[float] = []
    for number in range(rounds + 3):
        if number % READ_EVERY == 0:
            bandwidth += [float(row["value"]) for row in _read("cpu", 0.05)]
        shuffle(order)  # nobody always comes behind the same one, who leaves the caches behind
        for name, step in order:
            start = time.perf_counter()
            step()
            times[name].append((time.perf_counter() - start) * 1e3)
    times = {name: seen[3:] for name, seen in times.items()}
    middle = {name: statistics.median(seen) for name, seen in times.items()}
    bases = [(a + b) / 2 for a, b in zip(times["none"], times["none_again"], strict=True)]
    gb_per_s = statistics.median(bandwidth)
    nbytes = adapters[0].nbytes
    common = {"mode": "decode", "context": context, "batch": batch, "rank": RANK, "targets": "mlp"}
    common |= {"dtype": options.resolved_dtype, "scope": "engine", "reuse": "none", "n": rounds}
    rows: list[Row] = []
    for name, value in middle.items():
        ours = name in users
        base = middle["none" if ours else "peft_none"]
        row = {**common, "system": OURS if ours else "peft", "adapters": 0, "variant": name}
        row |= {"ms_per_token_p50": round(value, 4), "overhead": round(value / base, 4)}
        beside = bases if ours else times["peft_none"]
        extra = statistics.median(a - b for a, b in zip(times[name], beside, strict=True))
        count = users.get(name, int(name == "peft_unmerged"))
        if count:
            bound = count * nbytes / gb_per_s / 1e6
            row |= {"adapters": count, "extra_ms": round(extra, 4)}
            row |= {"byte_bound_ms": round(bound, 4), "byte_bound": round(extra / bound, 3)}
            row |= {"gb_per_s": round(gb_per_s, 1)}
        rows.append(row)
    return rows


def _ours(engine: DecoderEngine, context: int, bindings: list[AdapterBinding | None]) -> Callable[[], None]:
    """Prefills the requests; returns what decodes a token of each."""
    vocab = engine.spec.vocab_size
    seqs: list[Sequence] = []
    for i, binding in enumerate(bindings):
        prompt = tuple((7 * p + 3 * i) % (vocab - 1) + 1 for p in range(context))
        seqs.append(engine.add_request([TextSpan(prompt)], sampled=False, adapter=binding))
    while any(seq.logits is None for seq in seqs):
        engine.step()

    def step() -> None:
        for seq in seqs:
            engine.feed(seq, 5)
        engine.step()

    return step


def _wanted(options: Options) -> bool:
    named = options.peers is None or "peft" in options.peers
    return named and importlib.util.find_spec("peft") is not None


def _plain_model(target: Target, weights: Weights) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(target.folder)
    model = transformers.AutoModelForCausalLM.from_config(config).to(weights.dtype).eval()
    model.load_state_dict(dict(weights.tensors), strict=False)
    return model


def _peft_model(target: Target, weights: Weights, adapter: Adapter) -> Any:
    import peft

    model = _plain_model(target, weights)
    names = sorted({name for _, name in adapter.modules})
    lora = peft.LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=[f"{n}_proj" for n in names], task_type="CAUSAL_LM"
    )
    made: Any = peft.get_peft_model(model, lora)
    layers = made.base_model.model.model.layers
    for (layer, name), module in adapter.modules.items():
        place = layers[layer].get_submodule(_PEFT[name])
        place.lora_A["default"].weight.data = module.a.clone()
        place.lora_B["default"].weight.data = module.b.clone()
    return made.eval()


def _peft_steps(
    target: Target, weights: Weights, adapter: Adapter, context: int
) -> dict[str, Callable[[], None]]:
    import transformers

    model = _peft_model(target, weights, adapter)
    merged = _peft_model(target, weights, adapter).merge_and_unload()
    ids = torch.arange(1, context + 1)[None] % (target.spec.vocab_size - 1)

    def stepping(run_model: Any) -> Callable[[], None]:
        cache = transformers.DynamicCache()

        def call(tokens: torch.Tensor) -> None:
            with torch.inference_mode():
                run_model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)

        call(ids)
        return lambda: call(torch.tensor([[5]]))

    return {
        "peft_none": stepping(_plain_model(target, weights)),
        "peft_unmerged": stepping(model),
        "peft_merged": stepping(merged),
    }


def _swaps(options: Options, target: Target, weights: Weights) -> list[Row]:
    rounds = options.rounds(30, 3)
    engine = DecoderEngine(target.spec, weights, DecoderConfig(dtype=options.resolved_dtype))
    slots, adapters = engine.adapters, [_adapter(weights, i, PROJECTIONS) for i in range(2)]
    common: Row = {"mode": "swap", "rank": RANK, "targets": "all", "dtype": options.resolved_dtype}
    common |= {"scope": "engine", "reuse": "none", "n": rounds, "mb": round(adapters[0].nbytes / 1e6, 2)}
    with tempfile.TemporaryDirectory() as made:
        vault = MemVault(Path(made) / "vault")
        stored = checked(adapters[0].modules)
        ref = vault.write(encode_adapter(stored))
        calls: dict[str, Callable[[], None]] = {}

        def cold() -> None:
            slots.prefetch(decode_adapter(vault.read(ref), stored.digest))
            slots.publish(stored.digest)

        def warm() -> None:
            slots.publish("warm")

        calls["cold"], calls["publish"] = cold, warm
        if _wanted(options):
            calls |= _peft_swaps(target, weights, adapters, Path(made))
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds + 1):
            slots.prefetch(Adapter("warm", adapters[1].modules))
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                times[name].append((time.perf_counter() - start) * 1e3)
            slots.evict(stored.digest)
            slots.evict("warm")
    return [
        {
            **common,
            "system": "peft" if name.startswith("peft") else OURS,
            "variant": name,
            "swap_ms_p50": round(statistics.median(seen[1:]), 4),
        }
        for name, seen in times.items()
    ]


def _peft_swaps(
    target: Target, weights: Weights, adapters: list[Adapter], folder: Path
) -> dict[str, Callable[[], None]]:
    from peft.utils.hotswap import hotswap_adapter

    model = _peft_model(target, weights, adapters[0])
    model.save_pretrained(folder / "peft")
    model.add_adapter("other", model.peft_config["default"])
    names = ["other", "default"]

    def choose() -> None:
        names.reverse()
        model.set_adapter(names[0])

    def swap() -> None:
        hotswap_adapter(model, str(folder / "peft"), adapter_name="default", torch_device="cpu")

    return {"peft_set_adapter": choose, "peft_hotswap": swap}
