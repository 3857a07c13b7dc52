"""The worker that carries transformation jobs out, between requests and never in front of one.

It takes a job only while no request waits or runs, and looks again between memories; what it has done so far
is kept, because a record that is there already is not built again: a job that is done twice, or from its
middle, ends the same. Where the model goes, or a tier fails, the job goes back with the reason. Kinds that
another part carries out (`distil`, `decode`) wait, and say so, until that part has registered.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from uuid import uuid4

from memos_engine.activation import ActivationMemory
from memos_engine.combined import build_combined
from memos_engine.errors import ConflictError, MemoryNotFoundError, MemosEngineError
from memos_engine.memory.cube import MemCube
from memos_engine.memory.governance import Principal
from memos_engine.memory.lifecycle import LifecycleState
from memos_engine.memory.store import MemoryStore
from memos_engine.memory.store_jobs import LEASE_S, Job
from memos_engine.memory.transform import KINDS, PLACES, TEXT, Action, Known, TransformPolicy, plan
from memos_engine.memory.worker import Worker

log = logging.getLogger("memos_engine")
PAUSE_S = 1.0  # before a job that yielded is looked at again
MODEL_S = 30.0  # before one whose model has gone is


class Yielded(Exception):
    """A request has come: the job goes back, with what it has done."""


class Cancelled(Exception):
    """The owner has cancelled the job."""


# Carries a job out; calls `step(progress)` between parts, which may raise Yielded or Cancelled.
Step = Callable[[float], None]
Handler = Callable[[Job, Step], str]
SavedMs = Callable[[int, int], Mapping[str, float]]  # tokens and bytes of a record -> by place


class Transformer(Worker):
    """Jobs of one store, done with one model's activation memory (None: it was unloaded).

    `with Transformer(store, activation):` works in a thread of its own; `run_once()` does one job here.
    before: called in the thread before it looks for a job, while no request runs.
    """

    def __init__(
        self,
        store: MemoryStore,
        activation: ActivationMemory | None,
        *,
        worker: str | None = None,
        lease_s: float = LEASE_S,
        every_s: float = 1.0,
        before: Callable[[], object] | None = None,
    ) -> None:
        super().__init__("memory-transformer", every_s)
        self.store = store
        self.activation = activation
        self.worker = worker or f"w{os.getpid()}_{uuid4().hex[:8]}"
        self.lease_s, self.before = lease_s, before
        self._handlers: dict[str, Handler] = {
            "encode": self._encode,
            "combine": self._combine,
            "promote": self._promote,
            "demote": self._demote,
            "drop": self._drop,
        }

    def register(self, kind: str, handler: Handler) -> None:
        """Gives jobs of a kind to a handler, which returns a word on what it did; it raises MemosEngineError
        where the attempt failed, and must bear being called again for what it did already."""
        self._handlers[kind] = handler

    def queue(self, principal: Principal, actions: Sequence[Action]) -> list[Job]:
        """Makes jobs of a plan. Memories that have gone since are left out."""
        jobs = []
        for action in actions:
            waits = "" if action.kind in self._handlers else self._waits_for(action.kind)
            try:
                job = self.store.queue_job(
                    principal,
                    action.kind,
                    action.cube_ids,
                    value=action.value,
                    detail=action.detail,
                    reason=waits,
                )
            except MemoryNotFoundError:
                continue
            jobs.append(job)
        return jobs

    def look(
        self,
        principal: Principal,
        saved_ms: SavedMs,
        prices: Mapping[str, float],
        policy: TransformPolicy | None = None,
        together: Mapping[tuple[str, str], float] | None = None,
    ) -> list[Job]:
        """Plans for an owner's memories as they are now, and queues the plan; see `transform.plan`."""
        known = survey(self.model(), principal, saved_ms)
        return self.queue(principal, plan(known, prices, policy, together))

    @staticmethod
    def _waits_for(kind: str) -> str:
        return f"waits: nothing that does {kind!r} is registered with this engine"

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return self.activation is not None and not self.activation.decoder.idle

    def run_once(self) -> Job | None:
        """Does the most valuable job that is due; returns how it stands then. None: there was nothing to do,
        or a request runs."""
        if self.busy:
            return None
        missing = [kind for kind in KINDS if kind not in self._handlers]
        for kind in missing:
            self.store.explain_waiting([kind], self._waits_for(kind))
        job = self.store.claim_job(self.worker, list(self._handlers), self.lease_s)
        if job is None:
            return None
        try:
            return self._carry_out(job)
        except ConflictError as error:  # somebody else has it by now, or its memory was erased
            log.debug("memos_engine: %s", error)
            return None

    def _carry_out(self, job: Job) -> Job:
        def step(progress: float) -> None:
            if self.store.renew_job(job, progress, self.lease_s):
                raise Cancelled
            if self.busy or self._stop.is_set():
                raise Yielded

        try:
            return self.store.finish_job(job, self._handlers[job.kind](job, step))
        except Cancelled:
            return self.store.stop_job(job)
        except Yielded:
            return self.store.release_job(job, "made way for a request", PAUSE_S)
        except ModelGone as error:
            return self.store.release_job(job, str(error), MODEL_S)
        except MemoryNotFoundError as error:
            return self.store.fail_job(job, f"a memory of it is gone: {error.args[0]}", final=True)
        except ConflictError:
            raise
        except (MemosEngineError, OSError, RuntimeError, MemoryError) as error:
            log.warning("memos_engine: job %s (%s) failed and is tried again: %s", job.id, job.kind, error)
            return self.store.fail_job(job, f"{type(error).__name__}: {error}")

    # -- what it does by itself ------------------------------------------------------------------

    def model(self) -> ActivationMemory:
        """The activation memory that jobs are done with. Raises ModelGone."""
        if self.activation is None:
            raise ModelGone("waits: the model was unloaded")
        off = self.store.splicing_off(self.activation.model)
        if off is not None:
            raise ModelGone(f"waits: splicing is turned off for this model: {off}")
        return self.activation

    def _cubes(self, job: Job) -> list[MemCube]:
        return [self.store.get(job.owner, cube_id) for cube_id in job.cube_ids]

    def _encode(self, job: Job, step: Step) -> str:
        built = 0
        for done, cube in enumerate(self._cubes(job)):
            step(done / len(job.cube_ids))
            built += self.model().build(job.owner, [cube])
        return f"built the KV of {built} memories" if built else "the KV was there, or found no room"

    def _keys(self, job: Job) -> list[tuple[str, MemCube]]:
        """Keys of the records that the job's memories have now."""
        model, found = self.model(), []
        for cube in self._cubes(job):
            ids = model.layout.memory(cube.body or "")
            found += [
                (identity.digest(), cube)
                for identity in model.identities(job.owner, cube.id, ids).values()
                if self.store.find_kv(job.owner, cube.id, identity.digest()) is not None
            ]
        return found

    def _promote(self, job: Job, step: Step) -> str:
        """Reads records into the best tier that takes them."""
        model, moved = self.model(), 0
        for done, cube in enumerate(self._cubes(job)):
            step(done / len(job.cube_ids))
            stored = model.find(job.owner, cube, model.layout.memory(cube.body or ""))
            for form in stored.records:
                model.load(stored, form)
                moved += 1
        return f"moved {moved} records up"

    def _demote(self, job: Job, step: Step) -> str:
        to, moved = str(job.detail.get("to", "disk")), 0
        tiers = self.model().tiers
        for key, _ in self._keys(job):
            step(0.5)
            while tiers.holds(key) not in (to, "disk"):
                tiers.demote(key)
                moved += 1
        return f"moved down {moved} times"

    def _drop(self, job: Job, step: Step) -> str:
        """The records go, the text stays."""
        keys = self._keys(job)
        for key, _ in keys:
            step(0.5)
            self.model().tiers.drop(key)
            self.store.drop_kv(key, "not worth its bytes")
        return f"dropped {len(keys)} records; the text stays"

    def _combine(self, job: Job, step: Step) -> str:
        step(0.0)
        return build_combined(self.model(), job.owner, self._cubes(job))

    # -- a thread of its own ---------------------------------------------------------------------

    def publish(self) -> None:
        """Leaves word of the tiers in the store's directory, for `memos-engine top`."""
        tiers = {} if self.activation is None else self.activation.tiers.occupancy()
        said = {"at": self.store.now().isoformat(), "worker": self.worker, "tiers": tiers}
        draft = self.store.directory / f"status.{self.worker}.tmp"
        try:
            draft.write_text(json.dumps(said))
            draft.replace(self.store.directory / "status.json")
        except OSError as error:
            log.debug("memos_engine: nothing was said of the tiers: %s", error)

    def turn(self) -> bool:
        """A look at what is due, where no request runs, and one job. `stop` waits until the job under way has
        gone back at its next step."""
        try:
            if self.before is not None and not self.busy:
                self.before()
            done = self.run_once()
            self.publish()
        except MemosEngineError as error:
            log.warning("memos_engine: the store's jobs cannot be done now: %s", error)
            done = None
        return done is None or done.state == "waiting"


def survey(
    model: ActivationMemory, principal: Principal, saved_ms: SavedMs, limit: int = 1000
) -> list[Known]:
    """What is known of an owner's memories, the most valuable first, for `transform.plan`. saved_ms: what a
    use of a record of so many tokens and bytes saves from each place, in milliseconds."""
    spec, known = model.decoder.spec, []
    width = 1 if model.config.kv_dtype == "int8" else model.decoder.runner.model.weights.dtype.itemsize
    per_token = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * width
    now = model.store.now()
    for worth in model.store.worths(principal, limit):
        cube = worth.cube
        stored = model.find(principal, cube, model.layout.memory(cube.body or ""))
        held = {model.tiers.holds(identity.digest()) for identity, _ in stored.records.values()}
        nbytes = worth.nbytes or 2 * worth.tokens * per_token  # two records: behind the anchor, and averaged
        known.append(
            Known(
                cube.id,
                f"{cube.owner.tenant}\x1f{cube.owner.user}",
                worth.per_day / 86400,
                nbytes,
                saved_ms(worth.tokens, nbytes),
                max(held, key=PLACES.index, default=TEXT),
                cube.semantic_type,
                (now - cube.updated_at).total_seconds(),
                frozen=cube.state is LifecycleState.FROZEN,
            )
        )
    return known


class ModelGone(Exception):
    """There is no model to do it with, now."""
