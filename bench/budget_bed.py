"""The store of `bench budget`: users with paragraphs as memories, part of them with stored KV; questions."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from memos_engine.bench.options import Options
from memos_engine.bench.steady_traffic import store_folder
from memos_engine.bench.target import Target
from memos_engine.bench.xquad import Dataset, Question

from memos_engine.api import MemoryEngine
from memos_engine.calibration import calibrate
from memos_engine.config import DecoderConfig, MemoryConfig
from memos_engine.decoder.record import KVRecord
from memos_engine.memory.embed import Embedder, Vectors, default_embedder
from memos_engine.memory.scheduler import MemScheduler
from memos_engine.reply import Prepared
from memos_engine.user import UserMemory

USERS = (100, 6)  # with --quick the second
OTHERS = 5  # a user's paragraphs beside those of an article
MEMORIES, LEAST = 8, 0.0  # most that enter a request; the least cosine of one
STORED = 0.6  # of the paragraphs have stored KV
HELD = 0.25  # of the records' bytes, host memory holds
ZIPF = 1.0  # how unevenly users ask
POOL = 6144


@dataclass(frozen=True)
class Asked:
    """A user's number and a question about one of their memories."""

    user: int
    question: Question


class KnownTexts:
    """An embedder that has met the memories; questions are embedded when they come."""

    def __init__(self, embedder: Embedder, texts: Sequence[str]) -> None:
        self.model_id, self.dim, self._embedder = embedder.model_id, embedder.dim, embedder
        unique = list(dict.fromkeys(texts))
        self._known: dict[str, Vectors] = {}
        for start in range(0, len(unique), 16):
            some = unique[start : start + 16]
            self._known.update(zip(some, embedder.embed(some), strict=True))

    def embed(self, texts: Sequence[str]) -> Vectors:
        if all(text in self._known for text in texts):
            return np.stack([self._known[text] for text in texts])
        return self._embedder.embed(texts)


class Bed:
    """An engine over the filled store, and what its last request was made of."""

    def __init__(self, engine: MemoryEngine, dataset: Dataset, options: Options, users: int) -> None:
        self.engine, self.dataset, self.seed = engine, dataset, options.seed
        self.people: list[UserMemory] = [engine.user(f"user-{number:03}") for number in range(users)]
        self.holds = [self._paragraphs(number) for number in range(users)]
        self.ages: dict[str, int] = {}
        self.stored_bytes = 0
        self.last: Prepared | None = None
        engine.after_reply = self._seen  # type: ignore[method-assign]

    def _seen(self, prepared: Prepared) -> None:
        """In place of what follows a reply: nothing is built, so that all policies meet the same store."""
        self.last = prepared

    def _paragraphs(self, user: int) -> list[int]:
        """The numbers of a user's paragraphs: an article's, and some of others, mixed."""
        rng = random.Random(f"{self.seed}/user/{user}")
        count = len(self.dataset.paragraphs)
        first = (user * 5) % count
        own = [(first + i) % count for i in range(min(5, count))]
        others = [p for p in range(count) if p not in own]
        mixed = own + rng.sample(others, min(OTHERS, len(others)))
        rng.shuffle(mixed)
        return mixed

    def fill(self, tell: Callable[[str, int, int], None]) -> None:
        """Remembers, and stores the KV of STORED of the memories. A paragraph's KV is computed once: behind
        the anchor and neutral contexts it is the same for whoever remembers it."""
        made: dict[int, dict[str, KVRecord]] = {}
        activation, layout = self.engine.activation, self.engine.layout
        assert activation is not None
        for number, person in enumerate(self.people):
            for paragraph in self.holds[number]:
                text = self.dataset.paragraphs[paragraph]
                cube = person.remember(text)
                self.ages[cube.id] = len(self.ages)
                if random.Random(f"{self.seed}/stored/{paragraph}").random() >= STORED:
                    continue
                ids = layout.memory(text)
                if paragraph not in made:
                    activation.build(person.principal, [cube])
                    found = activation.find(person.principal, cube, ids)
                    made[paragraph] = {form: activation.load(found, form) for form in found.records}
                else:
                    for form, identity in activation.identities(person.principal, cube.id, ids).items():
                        record = replace(made[paragraph][form], identity="")
                        activation._put(person.principal, cube, record, identity)
                self.stored_bytes += sum(record.nbytes for record in made[paragraph].values())
            tell("building the store", number + 1, len(self.people))
        for person in self.people:  # reads the user's index, as a service has done before long
            person.recall("anything", k=1)
        activation.tiers.host.most = max(1 << 20, int(HELD * self.stored_bytes))
        activation.evict()

    def asked(self, count: int, part: str) -> list[Asked]:
        """Requests: users by Zipf's law, questions about their article."""
        rng = random.Random(f"{self.seed}/asked/{part}")
        weights = [1 / (rank + 1) ** ZIPF for rank in range(len(self.people))]
        by_paragraph: dict[int, list[Question]] = {}
        for question in self.dataset.questions:
            by_paragraph.setdefault(question.paragraph, []).append(question)
        out: list[Asked] = []
        while len(out) < count:
            (user,) = rng.choices(range(len(self.people)), weights)
            known = [q for p in self.holds[user] for q in by_paragraph.get(p, ())]
            out.append(Asked(user, rng.choice(known)))
        return out

    def fresh(self) -> None:
        """Forgets pages and tiers: every policy begins alike."""
        self.engine.decoder.forget_prefixes()
        if self.engine.activation is not None:
            self.engine.activation.evict()


@contextmanager
def opened(
    options: Options, target: Target, dataset: Dataset, tell: Callable[[str, int, int], None]
) -> Iterator[Bed]:
    """The bed, filled, its costs calibrated for this run alone."""
    users = USERS[1] if options.quick else USERS[0]
    decoder = DecoderConfig(dtype=options.dtype, pool_tokens=min(POOL, target.spec.max_positions))
    memory = MemoryConfig(max_memories=MEMORIES, min_score=LEAST, build=False, host_bytes=1 << 30)
    with store_folder(options) as folder:
        tell("embedding the memories", 0, 1)
        embedder = KnownTexts(default_embedder(), dataset.paragraphs)
        with MemoryEngine.open(
            target.folder, Path(folder) / "store", decoder=decoder, memory=memory, embedder=embedder
        ) as engine:
            engine.ready()
            bed = Bed(engine, dataset, options, users)
            bed.fill(tell)
            table = calibrate(engine.decoder, embedder, lambda what, i, n: tell(f"calibrating: {what}", i, n))
            base = engine.preparer.scheduler
            engine.preparer.use(MemScheduler(table, base.quality, base.need, distraction=base.distraction))
            bed.fresh()
            torch.manual_seed(options.seed)
            yield bed
