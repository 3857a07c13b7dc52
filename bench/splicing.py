"""Ways to use stored KV, each a function from a prompt to a plan: what is spliced, what is computed again.

Every method works on the same token ids, anchor | memories | query. Exact by construction is only what was
encoded behind just the tokens that stand to its left: the anchor, and the memory in slot 0. No method
computes those again, and r counts computed memory tokens over all memory tokens, slot 0's included.

A new method is one more function and one more `Method`: it may run the engine to probe, bring records of its
own in place of `Case.memories`, and choose which tokens are computed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain

import torch
from memos_engine.bench.forced import Plan, Reference

from memos_engine.config import Recompute
from memos_engine.decoder.engine import DecoderEngine
from memos_engine.decoder.identity import ids_digest
from memos_engine.decoder.quantize import quantize_record
from memos_engine.decoder.record import KVRecord
from memos_engine.decoder.sequence import KVSpan, Span, TextSpan

EARLY = 2  # layers that CacheBlend computes for every token before it selects


@dataclass(frozen=True)
class Case:
    """One prompt and what a method may look at: the engine (to probe) and the records. The reference is there
    for oracles, and for cacheblend, which computes its first layers anyway.

    memories: records encoded behind the anchor alone; stored: what the engine keeps, exact in slot 0 and
    averaged behind it; neutral: the same where no left context is the owner's.
    """

    engine: DecoderEngine
    anchor: KVRecord
    memories: tuple[KVRecord, ...]
    query: tuple[int, ...]
    reference: Reference
    key: str
    stored: tuple[KVRecord, ...] = ()
    neutral: tuple[KVRecord, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        spans = (self.anchor, *self.memories)
        return (*chain.from_iterable(record.token_ids for record in spans), *self.query)

    @property
    def starts(self) -> list[int]:
        """Position of each memory's first token."""
        sizes = [self.anchor.num_tokens, *(record.num_tokens for record in self.memories)]
        return list(accumulate(sizes))[:-1]

    @property
    def memory_tokens(self) -> int:
        return sum(record.num_tokens for record in self.memories)

    @property
    def candidates(self) -> list[int]:
        """Positions worth computing again: the memories' behind slot 0, which is exact."""
        first = self.anchor.num_tokens + self.memories[0].num_tokens
        return list(range(first, self.anchor.num_tokens + self.memory_tokens))

    def budget(self, share: float) -> int:
        """Tokens that a share of all memory tokens allows."""
        return min(round(share * self.memory_tokens), len(self.candidates))


@dataclass(frozen=True)
class Method:
    """A named way from a case and a share r to a plan. fixed: the only r it has; at_zero: it has a row of its
    own where nothing is computed again (selections alone are all the same there)."""

    name: str
    plan: Callable[[Case, float], Plan]
    fixed: float | None = None
    at_zero: bool = False

    def shares(self, asked: Iterable[float]) -> list[float]:
        """Those at which it is measured."""
        if self.fixed is not None:
            return [self.fixed]
        return [share for share in asked if share > 0 or self.at_zero]


# -- methods -----------------------------------------------------------------------------------------


def full(case: Case, share: float) -> Plan:
    """Full prefill, r = 1: the reference's own K and V through the splice, question and answer computed over
    them in other chunks. Its KL is the numerical floor of all the rest."""
    end = len(case.ids) - len(case.query)
    k, v = case.reference.k[:, :end], case.reference.v[:, :end]
    record = KVRecord(k, v, case.ids[:end], "bench", ids_digest(()))
    return Plan((KVSpan(record), TextSpan(case.query)), recomputed=case.memory_tokens)


def computed(case: Case, share: float) -> Plan:
    """Full prefill with nothing from records: for an engine of another dtype."""
    return Plan((TextSpan(case.ids),), recomputed=case.memory_tokens)


def none(case: Case, share: float) -> Plan:
    """The memories left out."""
    return Plan((KVSpan(case.anchor), TextSpan(case.query)))


def own(case: Case, share: float) -> Plan:
    """What the engine does: averaged records; the tokens that a first pass of the query chooses."""
    return _by_engine(case, Recompute(share))


def own_int8(case: Case, share: float) -> Plan:
    """The same with K and V stored as int8, in slot 0 too."""
    return own(replace(case, stored=tuple(quantize_record(record) for record in case.stored)), share)


def own_neutral(case: Case, share: float) -> Plan:
    """The same with averages over left contexts that belong to nobody."""
    return own(replace(case, stored=case.neutral), share)


def ranked(case: Case, share: float) -> Plan:
    """Averaged records; the tokens with the highest ranks of their own, without a first pass."""
    return _by_engine(case, Recompute(share, by="rank"))


def anchored(case: Case, share: float) -> Plan:
    """Records encoded behind the anchor alone, as they are, K rotated to its place."""
    return _refined(case, case.memories, ())


def at_random(case: Case, share: float) -> Plan:
    """A random choice of tokens: what the share alone is worth."""
    rng = random.Random(f"{case.key}/{share}")
    return _refined(case, case.memories, rng.sample(case.candidates, case.budget(share)))


def first_k(case: Case, share: float) -> Plan:
    """The first tokens of every memory (EPIC's LegoLink, arXiv 2410.15332), k set by the share.

    The last of them fall short by one in some memories, so that the share is met to the token.
    """
    behind = zip(case.starts[1:], case.memories[1:], strict=True)
    offsets = sorted((i, start + i) for start, record in behind for i in range(record.num_tokens))
    return _refined(case, case.memories, [position for _, position in offsets[: case.budget(share)]])


def cacheblend(case: Case, share: float) -> Plan:
    """The tokens whose V in layer 1 is farthest (L2) from the stored one (CacheBlend, arXiv 2405.16444).

    As published, layers 0 and 1 are computed for every token, so their K and V are fresh for all; here they
    are those of the reference, whose first layers are the same computation. The share does not count them.
    """
    end = case.anchor.num_tokens + case.memory_tokens
    stored = torch.cat([record.v[:EARLY][-1] for record in case.memories])
    fresh_v = case.reference.v[:EARLY][-1, case.anchor.num_tokens : end]
    deviation = (fresh_v - stored).square().sum(dim=(1, 2))
    deviation = deviation[case.memories[0].num_tokens :]
    top = deviation.topk(case.budget(share)).indices + case.candidates[0] if case.candidates else deviation
    fresh = [_fresh_early(case, at, record) for at, record in zip(case.starts, case.memories, strict=True)]
    return _refined(case, (case.memories[0], *fresh[1:]), [int(position) for position in top.tolist()])


def everything(case: Case, share: float) -> Plan:
    """r = 1 by the spliced way: every memory token behind slot 0 computed again. Must equal full prefill."""
    return _refined(case, case.memories, case.candidates)


def wrong_positions(case: Case, share: float) -> Plan:
    """A control: K stored after its rotation behind the anchor and rotated once more when it is spliced."""
    model = case.engine.runner.model
    turned = []
    for record in case.memories[1:]:
        k = record.k.clone()
        first = case.anchor.num_tokens
        positions = torch.arange(first, first + record.num_tokens, dtype=torch.int32, device=k.device)
        for layer, table in zip(k, model.tables, strict=True):
            if table is not None:
                model.ops.rope(layer, positions, table)
        turned.append(replace(record, k=k))
    return _refined(case, (case.memories[0], *turned), ())


def shuffled_values(case: Case, share: float) -> Plan:
    """A control: the keys are right, the values are other tokens'."""
    rng = random.Random(case.key)
    mixed = [replace(r, v=r.v[:, rng.sample(range(r.num_tokens), r.num_tokens)]) for r in case.memories[1:]]
    return _refined(case, (case.memories[0], *mixed), ())


OWN, NEUTRAL = "memos_engine", "neutral"
METHODS = (
    Method("full", full, fixed=1.0),
    Method("none", none, fixed=0.0),
    Method(OWN, own, at_zero=True),
    Method("int8", own_int8, at_zero=True),
    Method(NEUTRAL, own_neutral, at_zero=True),
    Method("rank", ranked),
    Method("anchored", anchored, fixed=0.0),
    Method("random", at_random),
    Method("first_k", first_k),
    Method("cacheblend", cacheblend),
)
CONTROLS = (
    Method("wrong_positions", wrong_positions, fixed=0.0),
    Method("shuffled_values", shuffled_values, fixed=0.0),
)


def _refined(case: Case, memories: Sequence[KVRecord], selected: Sequence[int]) -> Plan:
    spans = (KVSpan(case.anchor), *(KVSpan(record) for record in memories), TextSpan(case.query))
    return Plan(spans, tuple(sorted(selected)), len(selected))


def _by_engine(case: Case, recompute: Recompute) -> Plan:
    """The engine's own choice, taken from a request of its own that ends when the choice is made."""
    if recompute.share == 1:
        return _refined(case, case.stored, case.candidates)
    memories = [KVSpan(record) for record in case.stored]
    spans: tuple[Span, ...] = (KVSpan(case.anchor, memory=False), *memories, TextSpan(case.query))
    request = case.engine.add_request(spans, sampled=False, recompute=recompute)
    while request.selected is None and request.error is None:
        case.engine.step()
    case.engine.abort(request)
    if request.error is not None:
        raise request.error
    return Plan(spans, request.selected or (), len(request.selected or ()))


def _fresh_early(case: Case, start: int, record: KVRecord) -> KVRecord:
    here = slice(start, start + record.num_tokens)
    k, v = record.k.clone(), record.v.clone()
    k[:EARLY], v[:EARLY] = case.reference.k[:EARLY, here], case.reference.v[:EARLY, here]
    return replace(record, k=k, v=v)
