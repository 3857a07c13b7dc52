"""Shared spliced pages under any traffic: what each position of each request holds, told by a stand-in for
the tensors that writes down who wrote what."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memos_engine.config import DecoderConfig, Recompute, SamplingParams
from memos_engine.decoder.engine import DecoderEngine
from memos_engine.decoder.identity import ids_digest
from memos_engine.decoder.record import KVRecord
from memos_engine.decoder.sequence import KVSpan, TextSpan
from memos_engine.decoder.spec import ModelSpec
from memos_engine.decoder.weights import Weights

PAGE = 4
ANCHOR = (7, 8, 9, 10, 11)
WISHES = [
    Recompute(),
    Recompute(0.2, "rank"),
    Recompute(0.2, "attention"),
    Recompute(0.2, "attention"),
    Recompute(1.0),
]
_MODEL: dict = {}


@pytest.fixture(autouse=True, scope="module")
def _for_the_machine(tiny_llama):
    _MODEL["model"] = tiny_llama(seed=8)


def stored(ids, left=None):
    """A record of zeros: only its serial, its ids and its statistics count here."""
    shape, digest = (3, len(ids), 2, 16), "" if left is None else ids_digest(left)
    rank = torch.rand(len(ids), generator=torch.Generator().manual_seed(len(ids)))
    return KVRecord(torch.zeros(shape), torch.zeros(shape), ids, "", digest, torch.ones(shape[:3]), rank)


class Notes:
    """Takes the runner's place. content: what is true of a slot: ("record", serial, row, position), ("exact",
    all tokens up to there), which may be the same numbers, or ("own", whose) for what was computed behind
    something approximate."""

    def __init__(self, runner):
        self.device, self.model, self.content, self.broken = runner.device, runner.model, {}, False
        self.draw = torch.Generator().manual_seed(0)

    def splice(self, seq, parts):
        for part in parts:
            for i in range(part.count):
                p = part.start + i
                self._write(seq, p, spliced(part.record, part.skip + i, p))
                if p < seq.exact:
                    self._write(seq, p, exact(seq.tokens, p), also=self.at(seq.blocks, p))
            if self.broken:
                self.broken = False
                raise OSError("the splice failed half-way")

    def settle(self):
        """Records are all there at once here."""

    def copy_pages(self, copies):
        for source, target in copies:
            for i in range(PAGE):
                self.content[target * PAGE + i] = self.content.get(source * PAGE + i)

    def run(self, batch):
        for seq, rows in batch:
            for p in rows:
                self._write(seq, p, exact(seq.tokens, p) if p < seq.exact_tokens else own(seq))
            if seq.probe is not None:
                seq.probe.scores += torch.rand(len(seq.probe.positions), generator=self.draw)
        return torch.randn(len(batch), 211, generator=self.draw)

    def at(self, blocks, position):
        return self.content.get(blocks[position // PAGE] * PAGE + position % PAGE)

    def _write(self, seq, position, what, also=()):
        self.content[seq.blocks[position // PAGE] * PAGE + position % PAGE] = {what, *also}


def spliced(record, row, position):
    return ("record", record.serial, row, position)


def exact(tokens, position):
    return ("exact", tuple(tokens[: position + 1]))


def own(seq):
    return ("own", id(seq.session) if seq.session else seq.id)


class Sharing(RuleBasedStateMachine):
    """Requests over a few records at a few places, on a pool that is mostly too small."""

    @initialize(pool=st.sampled_from([60, 80, 160]), share=st.sampled_from([True, True, True, False]))
    def start(self, pool, share):
        model = _MODEL["model"]
        spec = ModelSpec.from_config(model.config, type(model).__name__)
        config = DecoderConfig(
            dtype="float32",
            page=PAGE,
            pool_tokens=pool,
            prefill_chunk=16,
            prefill_beside=5,
            max_batch=3,
            share_spliced=share,
        )
        self.engine = DecoderEngine(spec, Weights.from_model(model, spec), config)
        self.engine.runner = self.notes = Notes(self.engine.runner)
        self.head = KVSpan(stored(ANCHOR, ()), memory=False)
        first = tuple(range(20, 26))
        self.memories = [stored(first, ANCHOR), *(stored(tuple(range(30, 30 + n))) for n in (6, 9, 13))]
        self.live, self.sessions = [], [self.engine.open_session() for _ in range(2)]

    def spans(self, text, which, query):
        head = [self.head] if text is None else [TextSpan(tuple(range(50, 50 + text)))]
        memories = [KVSpan(self.memories[i]) for i in which]
        return [*head, *memories, TextSpan(tuple(range(100, 100 + query)))]

    @rule(
        text=st.sampled_from([None, None, 3, 5]),
        which=st.sampled_from([[3], [3], [3, 2], [0, 3], [2, 3], [1, 2, 0], []]),
        query=st.integers(1, 4),
        new=st.integers(1, 9),
        wishes=st.lists(st.sampled_from(WISHES), min_size=1, max_size=3),
        sampled=st.booleans(),
        session=st.sampled_from([None, None, None, 0, 1]),
    )
    def add(self, text, which, query, new, wishes, sampled, session):
        """Several requests that differ in what they compute again alone; the last one may be a session's."""
        for i, wish in enumerate(wishes):
            talk = None if session is None or i + 1 < len(wishes) else self.sessions[session]
            if talk is not None and (talk.request is not None or talk.tokens > 20):
                return
            self.live.append(
                self.engine.add_request(
                    self.spans(text, which, query),
                    SamplingParams(max_new_tokens=new),
                    sampled=sampled,
                    session=talk,
                    recompute=wish,
                )
            )

    @rule(times=st.integers(1, 4))
    def step(self, times):
        for _ in range(times):
            self.engine.step()
            self.sound()
        self.live = [seq for seq in self.live if seq.finish_reason is None]

    @rule()
    def feed(self):
        for seq in [s for s in self.live if s.logits is not None]:
            if len(seq.output) + 1 >= seq.params.max_new_tokens or len(seq.tokens) > 40:
                self.engine.finish(seq)
            else:
                self.engine.feed(seq, int(seq.logits.argmax()))

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 9), how=st.sampled_from(["abort", "finish"]))
    def end(self, which, how):
        """Wherever it stands, within its prompt too."""
        getattr(self.engine, how)(self.live.pop(which % len(self.live)))

    @rule(what=st.sampled_from(["splice", "splice", "forget", "sessions", "weights"]))
    def rare(self, what):
        if what == "splice":
            self.notes.broken = True
        elif what == "forget":
            self.engine.forget_prefixes()
        elif what == "weights":
            self.engine.use_weights(self.engine.runner.model.weights)
        for i, session in enumerate(self.sessions if what == "sessions" else ()):
            if session.request is None:
                self.engine.close_session(session)
                self.sessions[i] = self.engine.open_session()

    @invariant()
    def sound(self):
        if not hasattr(self, "engine"):
            return
        self.engine.check_integrity()
        for seq in self.engine.batcher.running:
            again = {*seq.kept, *(seq.selected or ())}
            there = set(range(len(seq.tokens))) - set(seq.pending)
            self.check(seq, seq.spans, seq.blocks, seq.tokens, again, there, seq.exact_tokens)
        for session in self.engine.batcher.sessions:
            if session.blocks and session.epoch == self.engine.pool.epoch:
                tokens = [t for span in session.spans for t in span.token_ids]
                there = set(range(session.computed))
                self.check(
                    None, session.spans, session.blocks, tokens, set(session.selected), there, 0, session
                )

    def check(self, seq, spans, blocks, tokens, again, there, exact_tokens, session=None):
        """Each position holds its record's row, or what this request (or its session) computed."""
        mine = own(seq) if seq is not None else ("own", id(session))
        start = 0
        for span in [*spans, TextSpan(tuple(tokens[sum(len(s.token_ids) for s in spans) :]))]:
            for row in range(len(span.token_ids)):
                position = start + row
                if position not in there:
                    continue
                computed = not isinstance(span, KVSpan) or position in again
                approximate = mine if computed else spliced(span.record, row, position)
                allowed = {exact(tokens, position)} if position < exact_tokens else {approximate}
                if not computed:  # a row that is exact here may lie on a page with others that are not
                    allowed.add(approximate)
                if session is not None:  # it does not tell how much of it is exact
                    allowed.add(exact(tokens, position))
                held = self.notes.at(blocks, position)
                assert (held or set()) & allowed, f"position {position}: {held}, not {allowed}"
            start += len(span.token_ids)

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        self.notes.broken = False
        for _ in range(500):
            self.step(1)
            self.feed()
            if not self.live:
                break
        assert not self.live
        for session in self.sessions:
            self.engine.close_session(session)
        self.engine.check_integrity()
        assert self.engine.pool.available == self.engine.pool.num_blocks - 1


TestSharing = Sharing.TestCase
TestSharing.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
