"""The way from facts to a stored adapter: prepare, train, measure, store with its report, never promote
unasked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from memos_engine.config import DecoderConfig, SamplingParams
from memos_engine.consolidate.facts import Fact, checked, surroundings
from memos_engine.consolidate.forward import TopLayers
from memos_engine.consolidate.gates import Gates, Report, as_examples, drift, spoken
from memos_engine.consolidate.recipe import Recipe
from memos_engine.consolidate.train import Ids, Progress, prepare, train
from memos_engine.decoder.adapter import Adapter, LowRank
from memos_engine.decoder.engine import DecoderEngine
from memos_engine.decoder.identity import ids_digest
from memos_engine.decoder.record import KVRecord
from memos_engine.decoder.sequence import KVSpan, Span, TextSpan
from memos_engine.decoder.weights import Weights
from memos_engine.errors import StoreError
from memos_engine.memory.adapters import AdapterVersion
from memos_engine.memory.governance import Principal
from memos_engine.memory.values import validate_text
from memos_engine.parameter import ParameterMemory
from memos_engine.prompt import PromptLayout

_PATHS = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
_SAID = 22  # tokens of an answer that is measured


class Engine(Protocol):
    """What of `MemoryEngine` is needed."""

    decoder: DecoderEngine
    layout: PromptLayout
    tokenizer: Any
    eos_token_ids: tuple[int, ...]
    parameter: ParameterMemory | None


@dataclass(frozen=True)
class Consolidated:
    """The stored version (unpromoted unless it was asked for, and passed), and the report."""

    version: AdapterVersion
    report: Report


def consolidate(
    engine: Engine,
    principal: Principal,
    name: str,
    facts: Sequence[Fact],
    *,
    recipe: Recipe | None = None,
    gates: Gates | None = None,
    sources: Sequence[str] = (),
    promote: bool = False,
    progress: Progress | None = None,
) -> Consolidated:
    """Trains an adapter on the facts, measures it on wordings that it has not seen, and stores it with the
    report.

    sources: ids of the memories that the facts are from, beside those that the facts name; it goes with any
    of them. promote: use it, if every gate passes; one that fails stays stored, unused. Takes minutes on a
    CPU. Raises MemoryInputError, UnsupportedModelError, Diverged, MemoryNotFoundError (a source), StoreError.
    """
    memory = engine.parameter
    if memory is None:
        raise StoreError("this engine has no store; open it with store=<directory> to keep an adapter.")
    facts, recipe, gates = checked(facts), recipe or Recipe(), gates or Gates()
    validate_text(name, 128)
    told = progress or (lambda what, done, of: None)
    ids = list(dict.fromkeys([*sources, *(fact.memory for fact in facts if fact.memory is not None)]))
    for one in ids:  # before minutes are spent
        memory.store.get(principal, one)
    around = surroundings(facts, recipe.seed)
    base = Speaker(engine, engine.decoder)
    top = TopLayers(engine.decoder, engine.layout.anchor, recipe.first(engine.decoder.spec.num_layers))
    kinds = prepare(top, facts, around, recipe, engine.layout.query, base.answer, base.tokens, told)
    trained = train(top, kinds, recipe, engine.decoder.runner.model.weights.dtype, told)
    told("measuring", 0, 4)
    other = Speaker(engine, merged_decoder(engine.decoder, trained.adapter))
    measured, misses = spoken(facts, around, base.say, other.say)
    told("measuring", 2, 4)
    wide = {key: replace(m, a=m.a.float(), b=m.b.float()) for key, m in trained.adapter.modules.items()}
    for prompts, names in ((around.drift, ("kl", "agreement")), (around.test_tasks, ("mention_kl", ""))):
        examples = as_examples(prompts, engine.layout.query, base.tokens(prompts, recipe.answer_tokens))
        found = drift(top, examples, wide)
        measured |= {key: value for key, value in zip(names, found, strict=True) if key}
    told("measuring", 4, 4)
    training = {"recipe": recipe.to_dict(), "loss": trained.loss, "cpu_s": round(trained.cpu_s, 1)}
    report = Report(
        measured,
        gates,
        list(dict.fromkeys(fact.subject for fact in facts)),
        [fact.to_dict() for fact in facts],
        misses,
        training,
    )
    version = memory.put(
        principal,
        name,
        trained.adapter,
        how="trained",
        report=report.to_dict(),
        sources=ids,
        promote=promote and report.passed,
    )
    return Consolidated(version, report)


class Speaker:
    """A decoder that answers questions behind the engine's anchor, whose KV is always the base model's: as in
    a request whose adapter is active from behind the anchor on."""

    def __init__(self, engine: Engine, decoder: DecoderEngine) -> None:
        self.engine, self.decoder = engine, decoder
        anchor = engine.layout.anchor
        self._head: list[Span] = []
        if anchor:
            k, v = engine.decoder.encode_span((), anchor)
            self._head = [KVSpan(KVRecord(k, v, anchor, "anchor", ids_digest(())), memory=False)]

    def answer(self, text: str) -> Ids:
        """An answer's ids, with the token that ends it."""
        ids = tuple(self.engine.tokenizer(text, add_special_tokens=False)["input_ids"])
        return (*ids, *self.engine.eos_token_ids[:1])

    def tokens(self, prompts: Sequence[str], most: int) -> list[Ids]:
        """Greedy answers of up to `most` tokens, several at a time."""
        params = SamplingParams(max_new_tokens=most, stop_token_ids=self.engine.eos_token_ids)
        found: list[Ids] = []
        for start in range(0, len(prompts), 8):
            sequences = [
                self.decoder.add_request([*self._head, TextSpan(self.engine.layout.query(prompt))], params)
                for prompt in prompts[start : start + 8]
            ]
            while any(sequence.finish_reason is None for sequence in sequences):
                self.decoder.step()
            for sequence in sequences:
                if sequence.error is not None:
                    raise sequence.error
                found.append(tuple(sequence.output))
        return found

    def say(self, prompts: Sequence[str]) -> list[str]:
        """The same as text."""
        decode = self.engine.tokenizer.decode
        return [str(decode(list(ids), skip_special_tokens=True)) for ids in self.tokens(prompts, _SAID)]


def merged_decoder(decoder: DecoderEngine, adapter: Adapter) -> DecoderEngine:
    """A decoder over the same weights with the adapter added to those that it changes; only these are
    copied."""
    spec, weights = decoder.spec, decoder.runner.model.weights
    tensors = dict(weights.tensors)
    for layer in {layer for layer, _ in adapter.modules}:
        changes = {name: m for (one, name), m in adapter.modules.items() if one == layer}
        prefix = f"model.layers.{layer}."
        if spec.fused and {"gate", "up"} & changes.keys():
            fused = f"{prefix}mlp.gate_up_proj.weight"
            gate, up = tensors[fused].float().chunk(2)
            parts = [_added(side, changes.pop(name, None)) for name, side in (("gate", gate), ("up", up))]
            tensors[fused] = torch.cat(parts).to(weights.dtype)
        for name, module in changes.items():
            key = f"{prefix}{_PATHS[name]}.weight"
            tensors[key] = _added(tensors[key].float(), module).to(weights.dtype)
    config = DecoderConfig(
        dtype=str(weights.dtype).removeprefix("torch."), pool_tokens=min(2048, decoder.pool_tokens)
    )
    return DecoderEngine(spec, Weights(tensors, spec), config)


def _added(weight: torch.Tensor, module: LowRank | None) -> torch.Tensor:
    if module is None:
        return weight
    delta: torch.Tensor = module.b.float() @ module.a.float()
    return weight + module.scale * delta
