"""Parameter memory end to end: whose adapter a request gets, from where on, and when it goes without."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from memos_engine import MemoryEngine, attach, detach
from memos_engine.config import DecoderConfig, SamplingParams
from memos_engine.decoder.adapter import Adapter, LowRank
from memos_engine.decoder.adapter_file import CONFIG, export_peft
from memos_engine.decoder.adapter_record import made, projection_shapes
from memos_engine.decoder.engine import DecoderEngine
from memos_engine.errors import AdapterError, MemoryInputError, MemoryNotFoundError
from memos_engine.memory.embed import HashingEmbedder
from memos_engine.parameter import ParameterMemory, names_subject, verify_adapters

FEW = SamplingParams(max_new_tokens=3)


@dataclass(frozen=True)
class _Binding:
    adapter: Adapter
    scale: float = 1.0
    active_from: int = 0
    approximate: bool = False


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Records what requests are bound to; where this decoder binds nothing yet, they run without."""
    real = importlib.util.find_spec("memos_engine.decoder.adapters") is not None
    if not real:
        module = types.ModuleType("memos_engine.decoder.adapters")
        module.AdapterBinding = _Binding  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "memos_engine.decoder.adapters", module)
    seen: list[Any] = []
    add, generate = DecoderEngine.add_request, DecoderEngine.generate

    def adding(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.get("adapter"))
        return add(self, *args, **(kwargs if real else {k: v for k, v in kwargs.items() if k != "adapter"}))

    def generating(self: Any, *args: Any, **kwargs: Any) -> Any:
        adapter = kwargs.pop("adapter", None)
        yield from generate(self, *args, **kwargs)
        seen[-1] = adapter  # of the request that add_request saw

    monkeypatch.setattr(DecoderEngine, "add_request", adding)
    if not real:
        monkeypatch.setattr(DecoderEngine, "generate", generating)
    return seen


@pytest.fixture
def engine(tiny_folder: Path, tmp_path: Path) -> Iterator[MemoryEngine]:
    with MemoryEngine.open(
        tiny_folder, tmp_path / "store", decoder=DecoderConfig(dtype="float32"), embedder=HashingEmbedder(64)
    ) as opened:
        yield opened


def adapter_for(engine: MemoryEngine, seed: int = 0, rank: int = 2) -> Adapter:
    shapes, generator = projection_shapes(engine.decoder.spec), torch.Generator().manual_seed(seed)
    out, width = shapes["down"]
    a = torch.randn(rank, width, generator=generator)
    b = torch.randn(out, rank, generator=generator)
    return made({(1, "down"): LowRank(a, b, 0.5)})


@pytest.fixture
def peft_folder(engine: MemoryEngine, tmp_path: Path) -> Callable[[int], Path]:
    def write(seed: int = 0) -> Path:
        folder = tmp_path / f"skill-{seed}"
        export_peft(adapter_for(engine, seed), folder, engine.decoder.spec)
        return folder

    return write


def test_from_a_folder_to_a_reply(
    engine: MemoryEngine, peft_folder: Callable[[int], Path], bound: list[Any], tmp_path: Path
) -> None:
    alice = engine.user("alice")
    alice.remember("My dog is called Biscuit.")
    stored = alice.adapters.import_(peft_folder(0))
    assert (stored.name, stored.state) == ("skill-0", "current")
    reply = alice.chat("What is my dog called?", FEW, adapter="skill-0")
    assert reply.adapter == "skill-0 version 1"
    binding = bound[-1]
    assert binding.adapter.digest == stored.digest == adapter_for(engine).digest
    assert binding.scale == 1.0
    before = (*engine.layout.anchor, *engine.layout.memory("My dog is called Biscuit."))
    assert binding.active_from == len(before)
    use = alice.adapters.use("skill-0", scale=0.5, whole=True)
    reply = alice.chat("What is my dog called?", FEW, adapter=use)
    assert (bound[-1].scale, bound[-1].active_from) == (0.5, 0)
    assert set(reply.forms.values()) <= {"text"}
    plain = alice.chat("What is my dog called?", FEW)
    assert plain.adapter == ""
    assert bound[-1] is None
    alice.adapters.export("skill-0", tmp_path / "out")
    assert alice.adapters.import_(tmp_path / "out", "again").digest == stored.digest


def test_versions_by_the_users_names(engine: MemoryEngine, peft_folder: Callable[[int], Path]) -> None:
    alice = engine.user("alice")
    for seed in (0, 1):
        alice.adapters.import_(peft_folder(seed), "skill", promote=seed == 0)
    assert [one.version for one in alice.adapters.list()] == [1]
    assert alice.adapters.promote("skill", 2).version == 2
    assert alice.adapters.rollback("skill").version == 1
    assert alice.adapters.use("skill").adapter.digest == adapter_for(engine, 0).digest
    assert [why for _, why in alice.adapters.verify()] == ["", ""]
    alice.adapters.erase("skill")
    assert alice.adapters.list(everything=True)[0].name is None
    with pytest.raises(MemoryInputError, match="0 adapters"):
        alice.adapters.delete("skill")


def test_nobody_elses(engine: MemoryEngine, peft_folder: Callable[[int], Path], bound: list[Any]) -> None:
    stored = engine.user("alice").adapters.import_(peft_folder(0))
    use = engine.user("alice").adapters.use("skill-0")
    bob = engine.user("bob")
    for wanted in ("skill-0", stored.cube_id, use):
        with pytest.raises(MemoryNotFoundError):
            bob.chat("Hello?", FEW, adapter=wanted)
    with pytest.raises(MemoryInputError, match="session"):
        engine.user("alice").chat("Hello?", FEW, adapter="skill-0", session="s")
    assert bound == []


def test_any_doubt_means_without_and_the_reply_says_so(
    engine: MemoryEngine, peft_folder: Callable[[int], Path], bound: list[Any]
) -> None:
    alice = engine.user("alice")
    stored = alice.adapters.import_(peft_folder(0))
    store = engine.opened_store
    path = store.vault.path(stored.blob)
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    reply = alice.chat("Hello?", FEW, adapter="skill-0")
    assert bound[-1] is None
    assert "damaged" in reply.adapter
    assert "damaged" in verify_adapters(store, alice.principal)[0][1]
    path.write_bytes(sound)
    assert alice.chat("Hello?", FEW, adapter="skill-0").adapter == "skill-0 version 1"
    with torch.no_grad():
        engine.decoder.runner.model.weights.layers[0].up.mul_(1.5)
    other = ParameterMemory(engine.decoder, store)  # as another process with other weights sees it
    with pytest.raises(AdapterError, match="another model"):
        other.load(alice.principal, stored)
    engine.parameter = other
    assert "another model" in alice.chat("Hello?", FEW, adapter="skill-0").adapter


def test_ended_memories_end_what_is_in_memory_too(
    engine: MemoryEngine, peft_folder: Callable[[int], Path]
) -> None:
    alice = engine.user("alice")
    dog = alice.remember("My dog is called Biscuit.")
    stored = alice.adapters.import_(peft_folder(0), sources=[dog.id])
    memory = engine.parameter
    assert memory is not None
    memory.load(alice.principal, stored)
    assert memory.warm(stored.digest)
    engine.opened_store.delete(alice.principal, dog.id)  # by somebody who does not know of this engine
    with pytest.raises(MemoryNotFoundError, match="is gone"):
        memory.load(alice.principal, stored)
    cat = alice.remember("My cat is called Tom.")
    alice.delete(cat.id)
    assert not memory.warm(stored.digest)


def test_choosing_at_most_one(engine: MemoryEngine) -> None:
    alice, memory = engine.user("alice"), engine.parameter
    assert memory is not None
    who = alice.principal
    dog, cat, sun = (alice.remember(text) for text in ("Biscuit is a dog.", "Tom is a cat.", "The sun."))
    pets = memory.put(
        who,
        "pets",
        adapter_for(engine, 1),
        how="trained",
        sources=[dog.id, cat.id],
        report={"subjects": ["Tom"]},
    )
    memory.put(who, "alone", adapter_for(engine, 2))  # nothing says what it knows
    assert memory.choose(who, []).option is None
    chosen = memory.choose(who, [(dog.id, 0.9), (sun.id, 0.2)], "Who is Tom?")
    assert chosen.option is not None
    assert (chosen.option.cube_id, chosen.option.probability) == (pets.cube_id, pytest.approx(0.9))
    assert (chosen.option.covers, chosen.option.policy) == ((dog.id,), "exclusive")
    assert not chosen.option.warm
    memory.load(who, pets)
    again = memory.choose(who, [(dog.id, 0.9)], "and tom?").option
    assert again is not None
    assert again.warm
    use = memory.use(who, again)
    assert (use.adapter.digest, use.label) == (pets.digest, "pets version 1")
    with pytest.raises(MemoryNotFoundError):
        memory.use(engine.user("bob").principal, again)
    memory.put(who, "pets", adapter_for(engine, 9))
    with pytest.raises(AdapterError, match="choose again"):
        memory.use(who, again)
    alice.adapters.rollback("pets")
    for found, query, why in (
        ([(sun.id, 0.9)], "Who is Tom?", "none of the memories found"),
        ([(dog.id, 0.9)], "Who is Tommy?", "names none of its subjects"),
    ):
        choice = memory.choose(who, found, query)
        assert choice.option is None
        assert why in dict(choice.rejected)[pets.cube_id]
    for found in ([(dog.id, 0.3)], [(dog.id, 0.5), (sun.id, 0.9)]):  # unsure; another memory fits better
        assert "below" in memory.choose(who, found, "Tom?").reason
    assert memory.choose(engine.user("bob").principal, [(dog.id, 1.0)]).option is None
    engine.opened_store.update(who, dog.id, "Biscuit is a cat.")
    assert "newer version" in dict(memory.choose(who, [(dog.id, 0.9)], "Tom?").rejected)[pets.cube_id]


def test_subjects_are_whole_words() -> None:
    assert names_subject("where is ANN?", ["Ann"])
    assert not names_subject("where is Anna?", ["Ann", ""])
    assert names_subject("and (a+)+?", ["(a+)+"])


def test_composition_is_one_owners_and_bounded(engine: MemoryEngine) -> None:
    alice, memory = engine.user("alice"), engine.parameter
    assert memory is not None
    for seed in (1, 2):
        memory.put(alice.principal, f"a{seed}", adapter_for(engine, seed, rank=200 if seed == 2 else 60))
    memory.put(engine.user("bob").principal, "b", adapter_for(engine, 3))
    with pytest.raises(MemoryNotFoundError):
        alice.adapters.compose(["a1", "b"], [1.0, 1.0])
    with pytest.raises(AdapterError, match="rank 260"):
        alice.adapters.compose(["a1", "a2"], [1.0, 1.0])
    one = alice.adapters.compose(["a1", "a1"], [1.0, -0.5])
    m, n = one.adapter.modules[1, "down"], adapter_for(engine, 1, rank=60).modules[1, "down"]
    torch.testing.assert_close(m.scale * m.b @ m.a, 0.5 * n.scale * n.b @ n.a)


def test_the_cache_is_bounded(engine: MemoryEngine) -> None:
    who = engine.user("alice").principal
    memory = ParameterMemory(engine.decoder, engine.opened_store, cache_bytes=adapter_for(engine).nbytes)
    stored = [memory.put(who, f"a{seed}", adapter_for(engine, seed)) for seed in (1, 2)]
    for one in stored:
        memory.load(who, one)
    assert [memory.warm(one.digest) for one in stored] == [False, True]


# -- attach --------------------------------------------------------------------------------------


def test_attached_models_take_adapters(
    engine: MemoryEngine, peft_folder: Callable[[int], Path], bound: list[Any], load: Any, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    engine.user("alice").adapters.import_(peft_folder(0), "mine")
    digest = adapter_for(engine).digest
    folder, store = peft_folder(1), tmp_path / "store"
    engine.close()
    model = load()
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    ids = torch.randint(3, 200, (2, 9))
    attach(model, tokenizer, store, user="alice", embedder=HashingEmbedder(64), adapter="mine")
    try:
        model.generate(ids, max_new_tokens=2, do_sample=False)
        assert [(one.adapter.digest, one.active_from) for one in bound] == [(digest, 0)] * 2
        bound.clear()
        model.generate(ids, max_new_tokens=2, do_sample=False, adapter=folder)
        assert {one.adapter.digest for one in bound} != {digest}
        bound.clear()
        model.generate(ids, max_new_tokens=2, do_sample=False, adapter=None)
        assert bound == [None, None]
        with pytest.raises(MemoryNotFoundError):
            model.generate(ids, max_new_tokens=2, adapter="mine", user="bob")
        with pytest.raises(AdapterError, match="no adapter enters"):
            model.generate(ids, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
        (folder / CONFIG).write_text("{}")
        with pytest.raises(AdapterError, match="only LORA"):
            model.generate(ids, max_new_tokens=2, adapter=folder)
    finally:
        detach(model)
