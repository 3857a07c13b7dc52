"""What plans under a budget are worth: distributions and answers against the best plan without one."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from memos_engine.bench.forced import Plan, Reference, evaluate, references
from memos_engine.bench.xquad import Question, answer_f1

from memos_engine.api import MemoryEngine
from memos_engine.config import Recompute
from memos_engine.decoder.sequence import KVSpan, Span, TextSpan
from memos_engine.preparing import Ask
from memos_engine.reply import Prepared


@dataclass(frozen=True)
class Verdict:
    """kl: mean over the reference's answer, in nats; f1: of the plan's own greedy answer; none_kl: kl of the
    same prompt without memories. gold_kl: from full prefill of the asked paragraph alone."""

    kl: float
    f1: float
    none_kl: float
    gold_kl: float


class Judge:
    """Scores plans; the same plan for the same question once. Runs between requests, off their clocks."""

    def __init__(self, engine: MemoryEngine, paragraphs: Sequence[str]) -> None:
        self.paragraphs = paragraphs
        self.engine, self.decoder, self.stop = engine, engine.decoder, list(engine.eos_token_ids)
        self._references: dict[str, tuple[Reference, Reference, float]] = {}
        self._verdicts: dict[tuple[object, ...], Verdict] = {}
        self._floor: list[float] = []

    def verdict(self, prepared: Prepared, question: Question, share: float) -> Verdict:
        spans = tuple(prepared.spans)
        key = (question.text, prepared.principal, share, tuple(map(_name, spans)))
        if key not in self._verdicts:
            best, gold, none = self._reference(prepared, question)
            plan = Plan(spans, self._selected(spans, share))
            (kl, f1), (gold_kl, _) = self._score(plan, (best, gold), question)
            self._verdicts[key] = Verdict(kl, f1, none, gold_kl)
        return self._verdicts[key]

    def note(self) -> str:
        """What rounding alone gives."""
        floor = statistics.fmean(self._floor) if self._floor else 0.0
        return (
            f"The reference itself, its anchor spliced and the rest computed in another forward, has a kl of "
            f"{floor:.5f}: what bfloat16 alone does."
        )

    def _score(
        self, plan: Plan, against: Sequence[Reference], question: Question
    ) -> list[tuple[float, float]]:
        """KL from each reference, and F1."""
        out = []
        for outcome in evaluate(self.decoder, [plan] * len(against), against, self.stop):
            ids = [token for token in outcome.answer if token not in self.stop]
            answer = self.engine.tokenizer.decode(ids, skip_special_tokens=True)
            out.append((statistics.fmean(outcome.kl), answer_f1(answer, question.answers)))
        return out

    def _reference(self, prepared: Prepared, question: Question) -> tuple[Reference, Reference, float]:
        """Full prefill of the best plan without a budget, as text, and of the asked paragraph alone; the KL
        of no memories from the first."""
        key = f"{prepared.principal}/{question.text}"
        if key not in self._references:
            layout = self.engine.layout
            head, tail = layout.anchor, layout.query(question.text)
            best = self.engine.prepare(prepared.principal, question.text, head, tail, Ask("text"))
            ids = tuple(token for span in best.spans for token in span.token_ids)
            alone = (*head, *layout.memory(self.paragraphs[question.paragraph]), *tail)
            empty = torch.empty(0)
            found, gold = (
                replace(one, k=empty, v=empty) for one in references(self.decoder, [ids, alone], self.stop)
            )
            bare = Plan((TextSpan(head), TextSpan(tail)))
            assert self.engine.activation is not None
            again = Plan((self.engine.activation.anchor(), TextSpan(ids[len(head) :])))
            self._floor.append(self._score(again, [found], question)[0][0])
            self._references[key] = found, gold, self._score(bare, [found], question)[0][0]
        return self._references[key]

    def _selected(self, spans: Sequence[Span], share: float) -> tuple[int, ...]:
        """What the engine computes again of these spans, from a request that ends when that is chosen."""
        if share == 0:
            return ()
        request = self.decoder.add_request(spans, sampled=False, recompute=Recompute(share))
        while request.selected is None and request.error is None:
            self.decoder.step()
        self.decoder.abort(request)
        if request.error is not None:
            raise request.error
        return request.selected or ()


def _name(span: Span) -> object:
    """What tells spans apart: text by its ids, KV by its record."""
    return span.record.identity if isinstance(span, KVSpan) else span.token_ids
