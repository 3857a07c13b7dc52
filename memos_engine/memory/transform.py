"""Which memories change their form, by value: the six paths of MemOS's figure (arXiv 2507.03724, section 3).

A pure function of what is known of the memories, prices and a policy; nothing is done here. What it returns
becomes jobs, the most valuable first (`memos_engine/transforming.py` does them).

| path | kind | when |
|---|---|---|
| text -> KV | encode | its uses save more than its bytes cost on disk |
| KV up and down the tiers, or dropped | promote, demote, drop | another place is worth more; the text stays |
| memories used together -> one KV record | combine | mostly used together, and by their owner alone |
| text / KV -> LoRA | distil | hot, unchanged for long, of a kind that says how to do things; behind gates |
| LoRA -> text | decode | cold, or its text has changed |
| sets of memories | promote, demote | the task goes over to another phase |

Only the first and second are about time alone, so that `value.best_place` decides them, with its margin.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from memos_engine.errors import MemoryInputError
from memos_engine.memory.value import best_place

TEXT = "text"
PLACES = (TEXT, "disk", "host", "device")  # upwards
KINDS = ("encode", "promote", "demote", "drop", "combine", "distil", "decode")
PROCEDURAL = frozenset({"procedure", "skill", "rule", "template", "preference"})
GATES = ("recall", "leak", "drift")


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a memory. rate: uses a second; nbytes: of its KV record, or what one would have;
    saved_ms: by place, what a use saves against the text; place: where its best form is now. unchanged_s:
    since its last version. adapted: an adapter holds it; stale: its text has changed since. frozen: its KV
    was asked to stay."""

    cube_id: str
    owner: str
    rate: float
    nbytes: int
    saved_ms: Mapping[str, float]
    place: str = TEXT
    semantic_type: str = "fact"
    unchanged_s: float = 0.0
    adapted: bool = False
    stale: bool = False
    frozen: bool = False


@dataclass(frozen=True, slots=True)
class TransformPolicy:
    """margin: see `value.Pace`. together: share of the uses of either of two memories that are of both, and
    uses_together: at least so many, before they become one record; parts: most memories of one. distil_rate,
    stable_s: at least so many uses a second, unchanged so long, before a memory goes to an adapter; below
    cold_rate it comes back. most: actions of one look."""

    margin: float = 0.2
    together: float = 0.6
    uses_together: float = 4.0
    parts: int = 4
    distil_rate: float = 10 / 86400
    stable_s: float = 7 * 86400.0
    cold_rate: float = 0.5 / 86400
    most: int = 64

    def __post_init__(self) -> None:
        if not (self.margin >= 0 and 0 < self.together <= 1 and self.uses_together > 0 and self.parts >= 2):
            raise MemoryInputError(f"{self}: margin >= 0, together in (0, 1], uses_together > 0, parts >= 2.")
        if not (0 <= self.cold_rate < self.distil_rate and self.stable_s >= 0 and self.most >= 1):
            raise MemoryInputError(f"{self}: cold_rate must be below distil_rate, most at least 1.")


@dataclass(frozen=True, slots=True)
class Action:
    """A change of form. value: milliseconds saved in a second, against leaving it."""

    kind: str
    cube_ids: tuple[str, ...]
    value: float
    reason: str
    detail: Mapping[str, Any] = field(default_factory=dict)


def plan(
    known: Sequence[Known],
    prices: Mapping[str, float],
    policy: TransformPolicy | None = None,
    together: Mapping[tuple[str, str], float] | None = None,
) -> list[Action]:
    """What to change now, the most valuable first.

    prices: of a byte in each place, milliseconds in a second. together: for pairs of memories, how often both
    were used in one request, decayed like `Known.rate`, with uses and not rates: so many in the time that
    `uses_together` is meant for.
    """
    policy = policy or TransformPolicy()
    actions = [action for one in known for action in _of_one(one, prices, policy)]
    actions += _combined(known, prices, policy, together or {})
    actions.sort(key=lambda action: (-action.value, action.kind, action.cube_ids))
    return actions[: policy.most]


def _gain(one: Known, place: str, prices: Mapping[str, float]) -> float:
    return one.rate * one.saved_ms.get(place, 0.0) - one.nbytes * prices.get(place, 0.0)


def _of_one(one: Known, prices: Mapping[str, float], policy: TransformPolicy) -> Iterable[Action]:
    ids = (one.cube_id,)
    if one.adapted and (one.stale or one.rate < policy.cold_rate):
        why = "its text has changed since" if one.stale else f"used {one.rate * 86400:.2g} times a day"
        yield Action("decode", ids, one.nbytes * prices.get("device", 0.0), f"leaves its adapter: {why}")
    elif (
        not one.adapted
        and one.semantic_type in PROCEDURAL
        and one.rate >= policy.distil_rate
        and one.unchanged_s >= policy.stable_s
    ):
        source = "text" if one.place == TEXT else "kv"
        yield Action(
            "distil",
            ids,
            one.rate * max(one.saved_ms.values(), default=0.0),
            f"hot, and unchanged for {one.unchanged_s / 86400:.0f} days",
            {"source": source, "gates": list(GATES)},
        )
    if one.frozen:
        return
    saved = {TEXT: 0.0, **one.saved_ms}
    place = best_place(one.rate, one.nbytes, saved, prices, one.place, policy.margin)
    if place == one.place:
        return
    kind = _kind(one.place, place)
    value = _gain(one, place, prices) - _gain(one, one.place, prices)
    reason = (
        f"saves {value:.3g} ms a second: {one.rate:.3g} uses a second x {saved[place]:.3g} ms, "
        f"{one.nbytes} bytes, {one.place} -> {place}"
    )
    yield Action(kind, ids, value, reason, {"from": one.place, "to": place})


def _kind(here: str, there: str) -> str:
    if here == TEXT:
        return "encode"
    if there == TEXT:
        return "drop"
    return "promote" if PLACES.index(there) > PLACES.index(here) else "demote"


def _combined(
    known: Sequence[Known],
    prices: Mapping[str, float],
    policy: TransformPolicy,
    together: Mapping[tuple[str, str], float],
) -> Iterable[Action]:
    """Memories that are mostly used together, greedily from the strongest pair; each in one record at most.

    Single linkage would chain memories that never meet: a memory joins only where it is near to all of a set.
    """
    by_id = {one.cube_id: one for one in known}
    uses = {}  # of each memory in any of the pairs
    near: dict[frozenset[str], float] = {}
    for (a, b), count in together.items():
        if a == b or a not in by_id or b not in by_id or by_id[a].owner != by_id[b].owner:
            continue
        near[frozenset((a, b))] = near.get(frozenset((a, b)), 0.0) + count
    uses = {(a,): together.get((a, a), 0.0) for a in by_id}

    def share(pair: frozenset[str]) -> float:
        a, b = sorted(pair)
        both = near.get(pair, 0.0)
        either = uses[(a,)] + uses[(b,)] - both
        return both / either if either > 0 and both >= policy.uses_together else 0.0

    taken: set[str] = set()
    for pair in sorted(near, key=lambda p: (-share(p), sorted(p))):
        if share(pair) < policy.together or pair & taken:
            continue
        members = sorted(pair)
        for other in sorted(by_id.keys() - taken - pair):
            fits = all(share(frozenset((other, member))) >= policy.together for member in members)
            if fits and len(members) < policy.parts:
                members.append(other)
        taken |= set(members)
        rate = min(by_id[m].rate for m in members)
        nbytes = sum(by_id[m].nbytes for m in members)
        # Together they are exact among themselves; what is saved is counted as from the disk.
        value = rate * sum(by_id[m].saved_ms.get("disk", 0.0) for m in members)
        value -= nbytes * prices.get("disk", 0.0)
        if value > 0:
            why = f"{share(pair):.0%} of their uses are together"
            yield Action("combine", tuple(members), value, why)


def swap(
    leaving: Sequence[Known],
    entering: Sequence[Known],
    up: str = "host",
    prices: Mapping[str, float] | None = None,
) -> list[Action]:
    """The task goes over to another phase: its memories' records come up, those of the last phase go down.

    A memory of both sets stays. What comes up is first, by what a use saves; nothing is encoded or dropped:
    only records that exist move.
    """
    stay = {one.cube_id for one in entering}
    actions = []
    for one in entering:
        if one.place in PLACES[1:] and PLACES.index(one.place) < PLACES.index(up):
            saved = one.saved_ms.get(up, 0.0) - one.saved_ms.get(one.place, 0.0)
            detail = {"from": one.place, "to": up}
            actions.append(Action("promote", (one.cube_id,), max(saved, 0.0), "its phase begins", detail))
    actions.sort(key=lambda action: (-action.value, action.cube_ids))
    for one in leaving:
        if one.cube_id not in stay and not one.frozen and PLACES.index(one.place) > 1:
            to = PLACES[PLACES.index(one.place) - 1]
            price = (prices or {}).get(one.place, 0.0) * one.nbytes
            detail = {"from": one.place, "to": to}
            actions.append(Action("demote", (one.cube_id,), price, "its phase has ended", detail))
    return actions
