"""One caller's searchable memories under one embedder, kept in step with the store, with their index."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from datetime import datetime

import numpy as np

from memos_engine.errors import StoreError
from memos_engine.memory import hnsw
from memos_engine.memory.governance import Principal
from memos_engine.memory.hnsw import HnswVectors, IndexLimits
from memos_engine.memory.index import Floats, Indices, VectorIndex
from memos_engine.memory.passages import Passages
from memos_engine.memory.store import MemoryStore
from memos_engine.memory.store_retrieval import PassageRow
from memos_engine.memory.vectors import ExactVectors

log = logging.getLogger("memos_engine")

MAX_VIEWS = 1024
MAX_ROWS = 500_000  # of all views but the newest: many callers with a few memories, or few with many
_MANY = 2000  # changes since the last look beyond which everything is read anew ...
_FEW = 100  # ... or, of a caller who has fewer memories than there are changes, this many

Run = Callable[[Callable[[], None]], None]


def in_background(work: Callable[[], None]) -> None:
    """Run `work` in a thread of its own, which does not keep the process alive."""
    threading.Thread(target=work, name="memos_engine-index", daemon=True).start()


class View:
    """Rows and vectors of what `principal` may see. Hold `lock` from `refresh` to the last look at them."""

    def __init__(
        self, store: MemoryStore, principal: Principal, model_id: str, limits: IndexLimits, run: Run
    ) -> None:
        self.lock = threading.RLock()
        self.passages = Passages()
        self.index: VectorIndex = ExactVectors()
        self._store, self._principal, self._model_id = store, principal, model_id
        self._limits, self._run = limits, run
        self._seq: int | None = None
        self._undone = store.undone
        self._rights: datetime | None = None  # when they change by themselves
        self._building = False
        about = json.dumps([store.store_id, principal.tenant, principal.key, model_id])
        self._name = hashlib.sha256(about.encode()).hexdigest()[:32]

    def refresh(self) -> None:
        """Take in every write that was committed before the call, by whichever process."""
        undone = self._store.undone
        seq, ids = self._store.changes(self._seq)
        over = self._rights is not None and self._store.now() >= self._rights
        if over or self._undone != undone:
            ids = None
        if ids is not None and len(ids) > self._many():
            ids = None
        if ids is None:
            self._read_all()
        elif ids:
            rows = self._store.passages(self._principal, self._model_id, ids=ids)
            gone, _ = self.passages.replace(ids, rows)
            self.index.drop(gone)
            self._put(rows)
        self._seq, self._undone = seq, undone
        self._choose()

    def _many(self) -> int:
        """Changes beyond which reading everything anew is faster: others' changes count, too, and a caller
        with a few memories reads those sooner than a thousand of them."""
        mine = len(self.passages)
        return min(max(_MANY, mine // 4), max(_FEW, mine))

    @property
    def exact(self) -> bool:
        """Whether every vector is looked at."""
        return isinstance(self.index, ExactVectors)

    def _put(self, rows: list[PassageRow]) -> None:
        keys = np.array([row.key for row in rows if row.vector is not None], np.int64)
        if len(keys):
            self.index.put(keys, np.stack([row.vector for row in rows if row.vector is not None]))

    def _read_all(self) -> None:
        self._rights = self._store.rights_change(self._principal)
        rows = self._store.passages(self._principal, self._model_id, vectors=False)
        self.passages.replace(None, rows)
        if self._large() and self._load():
            return
        self.index = ExactVectors()
        self._put(self._store.passages(self._principal, self._model_id))

    def _large(self) -> bool:
        return int(self.passages.embedded.sum()) > self._limits.exact and hnsw.library() is not None

    # -- the graph ---------------------------------------------------------------------------------------

    def _load(self) -> bool:
        """Serve from the snapshot, if there is a sound one that is not too old; read only what is newer."""
        files = self._store.snapshots
        snapshot = files.load(self._name)
        if snapshot is None or snapshot.model_id != self._model_id:
            return False
        _, changed = self._store.changes(snapshot.applied)
        if changed is None:
            return False
        graph = hnsw.load(str(files.path(snapshot)), snapshot.dim, snapshot.count)
        if graph is None:
            return False
        index = HnswVectors(graph)
        keys = self.passages.keys[self.passages.embedded]
        index.drop(np.setdiff1d(index.keys, keys))
        new = np.isin(self.passages.keys, np.setdiff1d(keys, index.keys))
        ids = {one.decode() for one in self.passages.ids[new]} | set(changed)
        self.index = index
        self._put(self._store.passages(self._principal, self._model_id, ids=ids) if ids else [])
        return True

    def _choose(self) -> None:
        """Have a graph built where one is due; what is there serves until it is done."""
        if self._building or not self._large():
            return
        if isinstance(self.index, HnswVectors) and not self.index.worn(self._limits):
            return
        erasures, seq = self._store.erasures(), self._store.changes(self._seq)[0]
        if seq != self._seq:
            return  # perhaps erased since these rows were read; the next refresh tries again
        if isinstance(self.index, ExactVectors):
            keys, matrix = self.index.matrix
        else:
            keys = self.passages.keys[self.passages.embedded]
            matrix = self.index.vectors(keys)
        self._building = True
        self._run(lambda: self._build(keys, matrix, seq, erasures))

    def _build(self, keys: Indices, matrix: Floats, seq: int, erasures: int) -> None:
        try:
            graph = hnsw.build(keys, matrix)
            self._swap(HnswVectors(graph), seq)
            self._store.keep_snapshot(
                self._name,
                graph.save_index,
                erasures,
                applied=seq,
                dim=int(matrix.shape[1]),
                model_id=self._model_id,
                count=len(keys),
            )
        except (StoreError, OSError, RuntimeError) as error:
            log.warning("memos_engine: the vector index was not kept: %s", error)
        finally:
            self._building = False

    def _swap(self, index: HnswVectors, seq: int) -> None:
        """Put a new graph in the place of the old index, with all that changed while it was built."""
        with self.lock:
            keys = self.passages.keys[self.passages.embedded]
            missing = np.setdiff1d(keys, index.keys)
            _, changed = self._store.changes(seq)
            if changed is None:
                return  # too much happened meanwhile: the next refresh decides
            index.drop(np.setdiff1d(index.keys, keys))
            again = np.isin(self.passages.ids, np.array(sorted(changed), "S36"))
            fresh = np.union1d(missing, self.passages.keys[again & self.passages.embedded])
            if len(fresh):
                index.put(fresh, self.index.vectors(fresh))
            self.index = index


class Views:
    """The views of a store's callers, the least recently used one dropped first."""

    def __init__(
        self, store: MemoryStore, limits: IndexLimits | None = None, run: Run = in_background
    ) -> None:
        self._store, self._limits, self._run = store, limits or IndexLimits(), run
        self._lock = threading.Lock()
        self._views: OrderedDict[tuple[Principal, str], View] = OrderedDict()

    def get(self, principal: Principal, model_id: str) -> View:
        """To be refreshed under its lock."""
        with self._lock:
            view = self._views.get((principal, model_id))
            if view is None:
                while self._views and sum(len(v.passages) for v in self._views.values()) > MAX_ROWS:
                    self._views.popitem(last=False)
                view = View(self._store, principal, model_id, self._limits, self._run)
                self._views[principal, model_id] = view
            self._views.move_to_end((principal, model_id))
            while len(self._views) > MAX_VIEWS:
                self._views.popitem(last=False)
            return view
