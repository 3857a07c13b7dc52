"""The way of a request to the decoder: retrieve, plan, lay out; and back, what it really took."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from memos_engine.activation import ActivationMemory, StoredKV
from memos_engine.calibration import load_costs
from memos_engine.chats import Chat
from memos_engine.combined import joined_head
from memos_engine.config import MemoryConfig, Recompute
from memos_engine.decoder.engine import DecoderEngine
from memos_engine.decoder.record import KVRecord
from memos_engine.decoder.sequence import KVSpan, Span, Stats, TextSpan
from memos_engine.decoder.weights import Weights
from memos_engine.errors import ContextLengthError, MemoryNotFoundError, MemosEngineError, OutOfPagesError
from memos_engine.memory.costs import CostTable
from memos_engine.memory.cube import MemCube
from memos_engine.memory.governance import Principal
from memos_engine.memory.need import DEFAULT_NEED, DISTRACTION, NeedModel
from memos_engine.memory.operator import Candidate
from memos_engine.memory.plan import Plan, PlanInput, PlanRequest, check_budget
from memos_engine.memory.quality import DEFAULT_QUALITY, SpliceQuality, sketch
from memos_engine.memory.residuals import Residuals
from memos_engine.memory.scheduler import MemScheduler
from memos_engine.outlook import Outlook, Surroundings
from memos_engine.parameter import AdapterUse, ParameterMemory
from memos_engine.planning import Since, plan_input, plan_with_records
from memos_engine.profile import load_profile
from memos_engine.prompt import PromptLayout
from memos_engine.reply import Prepared

log = logging.getLogger("memos_engine")

SPANS = 4096  # memories whose token ids and sketches are kept
WIDER = 2  # under a budget so many times more candidates are weighed than may enter
NEEDED = 0.05  # probability of being needed from which a memory that stayed out gets its KV built
LONG_TURNS = 2  # memories that a conversation holds from which on it counts as one that must cohere
Recall = Callable[[int], list[Candidate]]
Texts = dict[str, tuple[int, ...]]  # a memory's span


@dataclass(frozen=True)
class Ask:
    """What a caller wants of one request; None: the configuration's.

    form: auto, kv, text or none. max_memories: most that enter. recompute: share of their tokens to compute
    again. budget_ms: time until the first token. answer: tokens the caller may want, for which memories leave
    room (up to a quarter of the window). session: the conversation's name. adapters: whether the plan may
    bind one of the owner's by itself. query: the words that were searched for.
    """

    form: str | None = None
    max_memories: int | None = None
    recompute: float | None = None
    budget_ms: float | None = None
    answer: int = 1
    session: str | None = None
    adapters: bool = False
    query: str = ""


class Preparer:
    """Prepares requests of one engine. Safe for several threads."""

    def __init__(
        self,
        decoder: DecoderEngine,
        layout: PromptLayout,
        activation: ActivationMemory | None,
        config: MemoryConfig,
        parameter: ParameterMemory | None = None,
    ) -> None:
        self.decoder, self.layout, self.activation, self.config = decoder, layout, activation, config
        self.parameter = parameter
        self.outlook = Outlook(decoder)
        self.clock: Callable[[], float] = time.perf_counter
        self._spans: OrderedDict[str, tuple[tuple[int, ...], bytes]] = OrderedDict()
        self._scheduler: tuple[Weights, MemScheduler] | None = None

    @property
    def scheduler(self) -> MemScheduler:
        """The scheduler for the weights of now. What was learnt of costs outlives an exchange of weights."""
        weights = self.decoder.runner.model.weights
        if self._scheduler is None:
            self._scheduler = weights, self._made(weights, load_costs(self.decoder))
        elif self._scheduler[0] is not weights:
            old = self._scheduler[1]
            self._scheduler = weights, self._made(weights, old.costs, old.need, old.residuals)
        return self._scheduler[1]

    def _made(
        self,
        weights: Weights,
        costs: CostTable,
        need: NeedModel = DEFAULT_NEED,
        residuals: Residuals | None = None,
    ) -> MemScheduler:
        own = self.config.distraction
        distraction = DISTRACTION if own is None else own
        return MemScheduler(costs, self._quality(weights), need, residuals, distraction)

    def use(self, scheduler: MemScheduler) -> None:
        """Plans by this scheduler from now on, until the weights change; what another one learnt is its
        own."""
        self._scheduler = self.decoder.runner.model.weights, scheduler

    def _quality(self, weights: Weights) -> SpliceQuality:
        found = None if self.activation is None else load_profile(weights.digest, self.layout.digest)
        return DEFAULT_QUALITY if found is None or not found.points else SpliceQuality(found.kl)

    def forget(self) -> None:
        """Keeps no text of a memory."""
        self._spans.clear()
        self.outlook.forget()

    # -- before the decoder ----------------------------------------------------------------------

    def prepare(
        self,
        principal: Principal,
        recall: Recall | None,
        head: tuple[int, ...],
        tail: tuple[int, ...],
        ask: Ask,
        chat: Chat | None = None,
        start: float | None = None,
    ) -> Prepared:
        """Retrieves by `recall` (None: there is no store), plans and lays out: head | memories | tail.

        start: when the call began, by the clock of `time.perf_counter`.
        """
        since = Since(self.clock() if start is None else start, self.clock)
        begun = since()
        budget = self.config.ttft_budget_ms if ask.budget_ms is None else ask.budget_ms
        check_budget(budget)
        form = ask.form or self.config.form
        limit = self.config.max_memories if ask.max_memories is None else ask.max_memories
        behind = chat.pages.tokens if chat is not None else 0
        anchored = self.activation is not None and head[: len(self.layout.anchor)] == self.layout.anchor
        around = Surroundings(
            head,
            tail,
            behind,
            len(self.layout.anchor) * (anchored and not behind),
            self._root(principal, chat),
        )
        request = PlanRequest(
            form=form,
            max_memory_tokens=self._window(around, ask.answer),
            max_memories=limit,
            min_score=self.config.min_score,
            recompute=self.config.recompute if ask.recompute is None else ask.recompute,
            budget_ms=budget,
            tolerance=self.config.quality_tolerance,
            frame=self.outlook.frame(around, self.scheduler.costs),
        )
        candidates, unsought = self._candidates(recall, request, since())
        retrieved = since()
        inputs, stored, texts = self._inputs(principal, candidates, form, around, ask, chat)
        if budget is not None and form in ("auto", "text"):
            request = replace(request, known=self.outlook.known(around, texts))
        if ask.adapters and self.parameter is not None and chat is None and candidates:
            scored = [(candidate.cube.id, candidate.score) for candidate in candidates]
            request = replace(request, adapter=self.parameter.choose(principal, scored, ask.query).option)
        planned = plan_with_records(self.scheduler, self.activation, inputs, request, stored, since)
        adapter, refused = self._adapter(principal, planned.plan)
        if refused:  # what it would have known enters as it is
            request = replace(request, adapter=None)
            planned = plan_with_records(self.scheduler, self.activation, inputs, request, stored, since)
        plan = self._expected(planned.plan, request, around, texts)
        plan = replace(plan, notes=(*filter(None, (unsought, refused)), *plan.notes))
        cubes = {c.cube.id: c.cube for c in candidates}
        plan, spans = self._spans_of(principal, plan, around, planned.records, texts, cubes)
        timings = {
            "retrieve": retrieved - begun,
            "fetch": planned.fetch_ms,
            "plan": since() - retrieved - planned.fetch_ms,
        }
        wanted = [s.cube_id for s in plan.segments]
        if budget is not None:  # what stayed out for want of time is there as KV the next time
            wanted += [s.cube_id for s in plan.skipped if s.need >= NEEDED][:limit]
        lacking = [cubes[one] for one in wanted if one in stored and not stored[one].whole]
        return Prepared(
            spans, self._foreseen(plan, bool(candidates)), principal, lacking, timings,
            whole=not behind, start=since.start, around=around, schedule_ms=planned.schedule_ms,
            adapter=adapter,
        )  # fmt: skip

    def _candidates(
        self, recall: Recall | None, request: PlanRequest, spent_ms: float
    ) -> tuple[list[Candidate], str]:
        """What retrieval finds; or nothing, and why it was not even asked."""
        if recall is None or request.form == "none" or request.max_memories == 0:
            return [], ""
        why = self.scheduler.no_time_to_retrieve(request, spent_ms)
        if why:
            self.scheduler.residuals.relax("retrieve")
            return [], why
        return recall(request.max_memories * (1 if request.budget_ms is None else WIDER)), ""

    def _expected(self, plan: Plan, request: PlanRequest, around: Surroundings, texts: Texts) -> Plan:
        """The plan with what is in pages of its leading texts taken off its forecast."""
        if plan.forecast is None:
            return plan
        reused = self.outlook.reused(around, [texts[one] for one in plan.leading("text")])
        spent = plan.forecast.total_ms - sum(plan.forecast.stages.values())
        return self.scheduler.expect(
            plan, replace(request, frame=replace(request.frame, spent_ms=spent)), reused
        )

    def _spans_of(
        self,
        principal: Principal,
        plan: Plan,
        around: Surroundings,
        records: dict[str, KVRecord],
        texts: Texts,
        cubes: dict[str, MemCube],
    ) -> tuple[Plan, list[Span]]:
        """The prompt as spans, and the plan as carried out: memories at its head may share a record."""
        joined: frozenset[str] = frozenset()
        if self.activation is not None and around.head == self.layout.anchor and not around.behind:
            plan, record, joined = joined_head(self.activation, principal, plan, cubes)
            if record is not None:
                records = {**records, plan.segments[0].cube_id: record}
        if around.behind:
            spans: list[Span] = [TextSpan(around.head)] if around.head else []
        else:
            spans = self._head(around.head, plan)
        for segment in plan.segments:
            one = segment.cube_id
            if one not in joined:
                spans.append(KVSpan(records[one]) if segment.form == "kv" else TextSpan(texts[one]))
        return plan, [*spans, TextSpan(around.tail)]

    def _adapter(self, principal: Principal, plan: Plan) -> tuple[AdapterUse | None, str]:
        """The adapter that a plan binds, loaded; or none, and why the planned one cannot be used."""
        if plan.adapter is None or self.parameter is None:
            return None, ""
        try:
            return self.parameter.use(principal, plan.adapter), ""
        except MemosEngineError as error:
            log.warning("memos_engine: the answer is given without adapter: %s", error)
            return None, f"without adapter: {error}"

    def _root(self, principal: Principal, chat: Chat | None) -> bytes:
        if chat is not None:
            return chat.pages.root
        return b"" if self.activation is None else self.activation.salt(principal)

    def _window(self, around: Surroundings, answer: int) -> int:
        """Tokens that memories may have. Raises ContextLengthError."""
        fits = min(self.decoder.spec.max_positions, self.decoder.pool_tokens) - 1
        used = len(around.head) + len(around.tail) + around.behind
        if used > fits:
            raise ContextLengthError(
                f"The prompt has {used} tokens without any memory, more than the {fits} that fit. Shorten "
                "it, begin another session, or open the engine with a larger pool_tokens."
            )
        return max(0, fits - used - min(answer, fits // 4))

    def _inputs(
        self,
        principal: Principal,
        candidates: list[Candidate],
        form: str,
        around: Surroundings,
        ask: Ask,
        chat: Chat | None,
    ) -> tuple[list[PlanInput], dict[str, StoredKV], Texts]:
        """Candidates for the scheduler, their stored KV and their tokens."""
        exact = around.head == self.layout.anchor and not around.behind
        coherent = chat is not None and len(chat.cube_ids) >= LONG_TURNS
        here: set[str] = set()
        if ask.session is not None and candidates and self.activation is not None:
            ids = [candidate.cube.id for candidate in candidates]
            here = self.activation.store.of_session(principal, ask.session, ids)
        stored: dict[str, StoredKV] = {}
        inputs: list[PlanInput] = []
        texts: Texts = {}
        for candidate in candidates:
            cube = candidate.cube
            if chat is not None and cube.id in chat.cube_ids:
                continue
            span, said = self._text(cube.body or "")
            texts[cube.id] = span
            found = StoredKV({}, "no KV was looked for")
            try:
                wanted = form != "text" and candidate.score >= self.config.min_score
                if wanted and self.activation is not None:
                    found = self.activation.find(principal, cube, span)
            except MemoryNotFoundError:  # deleted since it was found
                continue
            stored[cube.id] = found
            prefers = "text" if cube.id in here else "kv" if coherent else None
            inputs.append(plan_input(candidate, len(span), said, found, exact, prefers))
        return inputs, stored, texts

    def _text(self, body: str) -> tuple[tuple[int, ...], bytes]:
        """A memory's span and sketch, kept: both take longer than all the rest of planning."""
        found = self._spans.get(body)
        if found is None:
            found = self._spans[body] = self.layout.memory(body), sketch(body)
            while len(self._spans) > SPANS:
                self._spans.popitem(last=False)
        return found

    def _head(self, head: tuple[int, ...], plan: Plan) -> list[Span]:
        """What stands before the memories; the anchor comes from its own record where KV follows."""
        anchor = self.layout.anchor
        spans: list[Span] = []
        spliced = any(segment.form == "kv" for segment in plan.segments)
        if self.activation is not None and spliced and anchor and head[: len(anchor)] == anchor:
            try:
                spans.append(self.activation.anchor())
                head = head[len(anchor) :]
            except OutOfPagesError:
                log.debug("no free pages to encode the anchor in; it is computed with the prompt")
        if head:
            spans.append(TextSpan(head))
        return spans

    def _foreseen(self, plan: Plan, retrieved: bool) -> Plan:
        """The plan with what retrieving and planning were expected to take."""
        if plan.forecast is None:
            return plan
        costs, factor = self.scheduler.costs, self.scheduler.residuals.factors().get
        before = {"plan": costs.plan_ms} | ({"retrieve": costs.retrieve_ms} if retrieved else {})
        stages = {name: ms * factor(name, 1.0) for name, ms in before.items()} | dict(plan.forecast.stages)
        table = before | dict(plan.forecast.table)
        return replace(plan, forecast=replace(plan.forecast, stages=stages, table=table))

    # -- at the decoder, and behind it -----------------------------------------------------------

    def recompute(self, prepared: Prepared) -> Recompute:
        """What to compute again, and by when the first pass must be over for that to fit the budget."""
        plan = prepared.plan
        if plan.budget_ms is None or plan.forecast is None or plan.recompute == 0:
            return Recompute(plan.recompute)
        left = plan.budget_ms - Since(prepared.start, self.clock)() - plan.forecast.stages["forward"]
        return Recompute(plan.recompute, deadline_ms=max(0.0, left))

    def start_by(self, prepared: Prepared) -> float | None:
        """When the decoder must begin for the budget to be kept, on the clock of `time.perf_counter`."""
        plan = prepared.plan
        if plan.budget_ms is None or plan.forecast is None:
            return None
        takes = sum(plan.forecast.stages[name] for name in ("splice", "probe", "forward"))
        return prepared.start + (plan.budget_ms - takes) / 1e3

    def account(self, prepared: Prepared, stats: Stats, ttft_ms: float) -> Plan:
        """The plan with the times that it really took, from which later plans learn."""
        plan = prepared.plan
        actual = {
            **prepared.timings,
            "queue": stats.queue_ms,
            "splice": stats.splice_ms,
            "probe": stats.probe_ms,
            "forward": stats.ttft_ms - stats.queue_ms - stats.splice_ms - stats.probe_ms,
            "total": ttft_ms,
        }
        forecast, residuals = plan.forecast, self.scheduler.residuals
        if forecast is not None and not stats.preemptions:
            residuals.observe(forecast.table, actual)
            later = ("queue", "splice", "probe", "forward")
            residuals.promised(
                sum(forecast.stages[name] for name in later), sum(actual[name] for name in later)
            )
        if prepared.around is not None and not stats.preemptions:
            self.outlook.went(prepared.around, plan.leading("text"))
        return replace(plan, actual=actual)
