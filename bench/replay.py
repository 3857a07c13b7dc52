"""A replayable workload: who asks when for which memories. Seeded; the same seed gives the same events.

Made of what real use has: few users ask most; each has memories that are asked for again and again (Zipf),
in sessions about a topic; topics fade and others come (drift); requests come in bursts; now and then a
session reads through many memories that nobody asks for again (a scan). What a conversation holds already is
not wanted again in it, as in the engine. At `shift_at`, where one is planted,
other users ask most, and every user's topics and favourites change, all at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from random import Random


@dataclass(frozen=True)
class Kind:
    """A model that some users are served by. bytes_per_token: of KV as stored; work: computation of a token
    against SmolLM2-135M's, by parameters."""

    name: str
    bytes_per_token: int
    work: float


# 2 sides x layers x KV heads x head size x 2 bytes (int8: 1, and its scales).
KINDS = (
    Kind("SmolLM2-135M", 2 * 30 * 3 * 64 * 2, 1.0),
    Kind("SmolLM2-135M int8", 12000, 1.0),
    Kind("SmolLM2-360M", 2 * 32 * 5 * 64 * 2, 362 / 135),
    Kind("Qwen2.5-0.5B", 2 * 24 * 2 * 64 * 2, 494 / 135),
)


@dataclass(frozen=True)
class Memory:
    """tokens of its text; kind: the model of its user, and how that stores KV."""

    id: int
    user: int
    tokens: int
    kind: Kind

    @property
    def nbytes(self) -> int:
        return self.tokens * self.kind.bytes_per_token


@dataclass(frozen=True)
class Event:
    """A request: time in seconds, the user, and the ids of the memories that it wants."""

    time: float
    user: int
    wanted: tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """What is generated.

    users, memories (of each user); zipf: exponent of reuse, among users and among memories; session: requests
    of one in the mean; wanted: most memories of a request; drift: chance for each session that one of the
    user's topics gives way to another; scan: share of sessions that read through old memories; rate: requests
    a second in the mean; burst: how many times faster they come in a burst; shift_at: request at which the
    working set moves (None: never). tokens: median length of a memory, spread: sigma of its logarithm.
    kinds: models that users are served by, in turn.
    """

    users: int = 12
    memories: int = 120
    topics: int = 12
    zipf: float = 1.2
    session: float = 6.0
    wanted: int = 6
    drift: float = 0.05
    scan: float = 0.15
    rate: float = 2.0
    burst: float = 20.0
    shift_at: int | None = None
    tokens: float = 130.0
    spread: float = 0.8
    kinds: tuple[Kind, ...] = KINDS

    @property
    def in_topic(self) -> int:
        """Memories of a topic."""
        return max(1, self.memories // self.topics)


class Zipf:
    """Ranks 0, 1, ... with probability proportional to 1 / (rank + 1) ** s."""

    def __init__(self, n: int, s: float) -> None:
        self.heights = list(accumulate(1.0 / (rank + 1) ** s for rank in range(n)))

    def draw(self, random: Random) -> int:
        return random.choices(range(len(self.heights)), cum_weights=self.heights)[0]


class _User:
    """One user's memories by topic, and which topics are theirs now."""

    def __init__(self, ids: list[int], workload: Workload, random: Random) -> None:
        self.random, self.workload = random, workload
        size = workload.in_topic
        self.topics = [ids[i : i + size] for i in range(0, len(ids), size)]
        self.order = list(range(len(self.topics)))
        self.ids = ids

    def drift(self) -> None:
        """One of the favoured topics gives way to one that was not."""
        first = self.random.randrange(max(1, len(self.order) // 4))
        other = self.random.randrange(len(self.order))
        self.order[first], self.order[other] = self.order[other], self.order[first]

    def move_on(self) -> None:
        """The planted shift: other topics, and other favourites in each."""
        half = len(self.order) // 2
        self.order = self.order[half:] + self.order[:half]
        for topic in self.topics:
            self.random.shuffle(topic)


@dataclass
class _Session:
    """A conversation: topic None is a scan; inside: what it holds already, which is not spliced again."""

    user: int
    topic: int | None
    left: int
    inside: set[int] = field(default_factory=set)


def memories(workload: Workload, seed: int) -> list[Memory]:
    """All users' memories; a memory's id is its index."""
    random = Random(f"memories {seed}")
    made: list[Memory] = []
    first = random.randrange(len(workload.kinds))
    for user in range(workload.users):
        for _ in range(workload.memories):
            tokens = round(workload.tokens * math.exp(random.gauss(0.0, workload.spread)))
            kind = workload.kinds[(first + user) % len(workload.kinds)]
            made.append(Memory(len(made), user, min(max(tokens, 12), 2000), kind))
    return made


def events(workload: Workload, seed: int, requests: int) -> Iterator[Event]:
    """The requests, in time."""
    random = Random(f"events {seed}")
    users = [
        _User(list(range(u * workload.memories, (u + 1) * workload.memories)), workload, random)
        for u in range(workload.users)
    ]
    who, which_topic = Zipf(workload.users, workload.zipf), Zipf(len(users[0].topics), workload.zipf)
    within = Zipf(len(users[0].topics[0]), workload.zipf)
    time, made, busy = 0.0, 0, False
    under_way: list[_Session] = []
    users_by_rank = list(range(workload.users))
    while made < requests:
        if made == workload.shift_at:
            for user in users:
                user.move_on()
            under_way.clear()
            users_by_rank = users_by_rank[len(users) // 2 :] + users_by_rank[: len(users) // 2]
        if random.random() < 0.02:
            busy = not busy
        time += random.expovariate(workload.rate * (workload.burst if busy else 1.0))
        if not under_way or random.random() < 1.0 / workload.session:
            u = users_by_rank[who.draw(random)]
            if random.random() < workload.drift:
                users[u].drift()
            topic = None if random.random() < workload.scan else users[u].order[which_topic.draw(random)]
            under_way.append(_Session(u, topic, 1 + round(random.expovariate(1.0 / workload.session))))
        session = random.choice(under_way)
        wanted = _wants(users[session.user], session, within, workload, random)
        yield Event(time, session.user, wanted)
        session.inside.update(wanted)
        made += 1
        session.left -= 1
        if session.left <= 0:
            under_way.remove(session)


def _wants(
    user: _User, session: _Session, within: Zipf, workload: Workload, random: Random
) -> tuple[int, ...]:
    """Distinct memories of one request: of the session's topic, or anywhere where it is a scan; without those
    that the conversation holds already."""
    count = random.randint(1, workload.wanted)
    if session.topic is None:
        drawn = random.sample(user.ids, count)
    else:
        pool = user.topics[session.topic]
        drawn = [pool[min(within.draw(random), len(pool) - 1)] for _ in range(count)]
    return tuple(key for key in dict.fromkeys(drawn) if key not in session.inside)
