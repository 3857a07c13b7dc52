"""Transformations of one engine's memories between requests: what is worth it is known from the costs and
from what requests used together; `transforming.py` does it."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

from memos_engine.activation import ActivationMemory
from memos_engine.combined import combined_identity
from memos_engine.errors import MemoryNotFoundError, MemosEngineError
from memos_engine.memory.costs import CostTable, Frame, Load, stages
from memos_engine.memory.governance import Principal
from memos_engine.memory.plan import Plan
from memos_engine.memory.store_jobs import Job
from memos_engine.memory.transform import Known, TransformPolicy, plan
from memos_engine.memory.value import Usage, price
from memos_engine.transforming import ModelGone, Transformer, survey

log = logging.getLogger("memos_engine")

LOOK_S = 30.0  # between two looks at the memories of one owner
HALF_LIFE_S = 7 * 86400.0  # after which a use together counts half
OWNERS, PAIRS = 256, 4096  # whose uses are remembered, and pairs of each
QUERY = 24  # tokens of a question: what is computed anyway
# A record of a hundred tokens of a small model (4.6 MB in two forms) that saves 30 ms keeps its place on disk
# if it is used once a month.
DISK_PRICE = 2.5e-12  # milliseconds in a second, a byte
FULL = 0.9  # share of a tier from which on its bytes have a price
YOUNG_S = 7 * 86400.0  # memories that were made or changed since keep the KV that they have
MEBI = float(1 << 20)


def saved_by(
    costs: CostTable, factors: Mapping[str, float], anchor: int, tokens: int, nbytes: int
) -> dict[str, float]:
    """Milliseconds that a record of so many tokens saves a request, by the place where it waits: the forward
    of its tokens less its splice, and less its fetch from the disk. nbytes: of the record that is read."""
    frame = Frame(anchor, 0, 0, QUERY)

    def takes(load: Load) -> float:
        return sum(factors.get(name, 1.0) * float(ms) for name, ms in stages(costs, frame, load).items())

    text = takes(Load(text=tokens))
    host = text - takes(Load(kv=tokens, records=1))
    disk = text - takes(Load(kv=tokens, records=1, disk_records=1, disk_mib=nbytes / MEBI))
    return {"disk": disk, "host": host}


def in_order(ids: Sequence[str], together: Mapping[tuple[str, str], float]) -> tuple[str, ...]:
    """Memories in the order in which they mostly stood."""

    def ahead(one: str) -> float:
        others = [other for other in ids if other != one]
        return sum(together.get((one, o), 0.0) - together.get((o, one), 0.0) for o in others)

    return tuple(sorted(ids, key=lambda one: (-ahead(one), one)))


class Background:
    """Looks at owners' memories after their requests, queues what is worth it, and works while no request
    does. Uses together are remembered as long as the engine is open. Safe for several threads."""

    def __init__(
        self,
        activation: ActivationMemory,
        costs: Callable[[], tuple[CostTable, Mapping[str, float]]],
        policy: TransformPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """costs: the table of now, and the factors that requests taught, by stage."""
        self.activation, self.policy, self.clock = activation, policy, clock
        self.transformer = Transformer(activation.store, activation, before=self.look_around)
        self._costs = costs
        self._uses: OrderedDict[Principal, dict[tuple[str, str], Usage]] = OrderedDict()
        self._due: dict[Principal, float] = {}  # when they may be looked at
        self._looked: OrderedDict[Principal, float] = OrderedDict()
        self._lock = threading.Lock()

    # -- after a reply ---------------------------------------------------------------------------

    def used(self, principal: Principal, made: Plan) -> None:
        """Remembers which memories a request used together, and in which order. Touches no store."""
        ids = [segment.cube_id for segment in made.segments]
        now = self.clock()
        with self._lock:
            self._due.setdefault(principal, self._looked.get(principal, now - LOOK_S) + LOOK_S)
            counts = self._uses.setdefault(principal, {})
            self._uses.move_to_end(principal)
            for pair in [*((one, one) for one in ids), *combinations(ids, 2)]:
                counts[pair] = counts.get(pair, Usage()).used(now, HALF_LIFE_S)
            if len(counts) > PAIRS:
                weakest = sorted(counts, key=lambda pair: counts[pair].counted(now, HALF_LIFE_S))
                for pair in weakest[: PAIRS // 4]:
                    del counts[pair]
            while len(self._uses) > OWNERS:
                gone, _ = self._uses.popitem(last=False)
                self._due.pop(gone, None)

    def together(self, principal: Principal) -> dict[tuple[str, str], float]:
        """How often the first of two memories stood before the second in one request; with itself: how often
        each was used."""
        now = self.clock()
        with self._lock:
            counts = self._uses.get(principal, {})
            return {pair: usage.counted(now, HALF_LIFE_S) for pair, usage in counts.items()}

    def forget(self, principal: Principal) -> None:
        """Forgets what an owner's memories were used with."""
        with self._lock:
            self._uses.pop(principal, None)
            self._due.pop(principal, None)

    # -- between requests ------------------------------------------------------------------------

    def look(self, principal: Principal) -> list[Job]:
        """Plans for an owner's memories as they are now, and queues the plan."""
        with self._lock:
            self._due.pop(principal, None)
            self._looked[principal] = self.clock()
            self._looked.move_to_end(principal)
            while len(self._looked) > OWNERS:
                self._looked.popitem(last=False)
        known = survey(self.transformer.model(), principal, self._saved)
        young = {one.cube_id for one in known if one.unchanged_s < YOUNG_S}
        together = self.together(principal)
        actions = []
        for action in plan(known, self.prices(known), self.policy, together):
            if action.kind == "combine":
                ids = in_order(action.cube_ids, together)
                if not self._is_there(principal, ids):
                    actions.append(replace(action, cube_ids=ids))
            elif action.kind != "drop" or not young.issuperset(action.cube_ids):
                actions.append(action)
        return self.transformer.queue(principal, actions)

    def _is_there(self, principal: Principal, ids: tuple[str, ...]) -> bool:
        """Whether these memories have their common record."""
        store = self.activation.store
        try:
            cubes = [store.get(principal, one) for one in ids]
        except MemoryNotFoundError:
            return True  # nothing to do
        identity, _ = combined_identity(self.activation, principal, cubes)
        return store.find_combined(principal, ids, identity.digest()) is not None

    def look_around(self) -> None:
        """Looks at one owner that had a request since the last time, if enough time has passed."""
        now = self.clock()
        with self._lock:
            due = [principal for principal, at in self._due.items() if at <= now]
        if due:
            try:
                self.look(due[0])
            except ModelGone as error:
                log.debug("memos_engine: no look at memories now: %s", error)

    def _saved(self, tokens: int, nbytes: int) -> dict[str, float]:
        table, factors = self._costs()
        saved = saved_by(table, factors, len(self.activation.layout.anchor), tokens, nbytes // 2)
        device = self.activation.tiers.device.most > 0
        return {**saved, "device": saved["host"]} if device else saved

    def prices(self, known: Sequence[Known]) -> dict[str, float]:
        """Of a byte in each place. A tier with room costs nothing; a full one what the worst of the owner's
        records there earns over the disk."""
        found = {"disk": DISK_PRICE}
        for name, tier in self.activation.tiers.occupancy().items():
            full = tier["nbytes"] > FULL * tier["most"]
            earned = [
                one.rate * (one.saved_ms[name] - one.saved_ms["disk"]) / max(1, one.nbytes)
                for one in known
                if one.place == name and name in one.saved_ms
            ]
            found[name] = DISK_PRICE + (max(0.0, price(earned)) if full else 0.0)
        return found

    def work(self, principal: Principal) -> list[Job]:
        """Looks, and does what is due in the store until nothing is, or a request comes; returns the owner's
        jobs of this look as they stand then. Raises MemosEngineError where splicing is off."""
        try:
            queued = {job.id for job in self.look(principal)}
        except ModelGone as error:
            raise MemosEngineError(f"Nothing can be transformed now: {error}") from error
        while self.transformer.run_once() is not None:
            pass
        return [job for job in self.activation.store.jobs(principal, limit=1000) if job.id in queued]

    def start(self) -> None:
        """Works in a thread of its own from now on; starting twice is fine."""
        self.transformer.start()

    def stop(self) -> None:
        """Waits until the job under way has gone back at its next step."""
        self.transformer.stop()
