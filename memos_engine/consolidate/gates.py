"""What a trained adapter is measured by, and the gates that it has to pass before it is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from memos_engine.consolidate.facts import Fact, Surroundings, mentions
from memos_engine.consolidate.forward import Deltas, TopLayers
from memos_engine.consolidate.train import Example, Ids, divergence
from memos_engine.errors import MemoryInputError

Ask = Callable[[Sequence[str]], list[str]]


@dataclass(frozen=True)
class Gates:
    """Least `recall` of held-out questions; most answers with a memorised value to questions about others
    (`leak`), about others beside the subject (`co`) and about what is not stored (`unstored`); most drift
    from the base model on ordinary prompts (`kl`, nats a token) and least `agreement` of its next token; most
    drift on tasks that only name the subject (`mention_kl`)."""

    recall: float = 0.8
    leak: float = 1 / 12
    co: float = 0.25
    unstored: float = 0.125
    kl: float = 0.05
    agreement: float = 0.95
    mention_kl: float = 0.06

    def __post_init__(self) -> None:
        if not all(type(value) in (int, float) and 0 <= value < 100 for value in asdict(self).values()):
            raise MemoryInputError("gates are numbers of at least 0; shares lie between 0 and 1.")

    def failed(self, measured: dict[str, float]) -> list[str]:
        """Names of the gates that these measurements do not pass; what is no number passes none."""
        wrong = []
        for name, limit in asdict(self).items():
            value = measured[name]
            least = name in ("recall", "agreement")
            if not (value >= limit if least else value <= limit):
                wrong.append(name)
        return wrong


@dataclass(frozen=True)
class Report:
    """What was measured, against which gates. It holds the facts and the misses, so it is erased with
    them."""

    measured: dict[str, float]
    gates: Gates
    subjects: list[str]
    facts: list[dict[str, Any]]
    misses: list[str]
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> list[str]:
        return self.gates.failed(self.measured)

    @property
    def passed(self) -> bool:
        return not self.failed

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe. `passed` and `failed` are what the store reads before it promotes, `subjects` what
        requests must name."""
        return {
            "passed": self.passed,
            "failed": self.failed,
            "measured": {name: round(value, 6) for name, value in self.measured.items()},
            "gates": asdict(self.gates),
            "subjects": self.subjects,
            "training": self.training,
            "misses": self.misses,
            "facts": self.facts,
        }


def spoken(
    facts: Sequence[Fact], around: Surroundings, base: Ask, adapted: Ask
) -> tuple[dict[str, float], list[str]]:
    """Recall and leaks, by what is said greedily; and the held-out questions that were missed. A value counts
    where it is said in full, as whole words."""
    held_out = [(question, fact.value) for fact in facts for question in fact.held_out]
    questions = [question for question, _ in held_out]
    said = adapted(questions)
    misses = [
        f"{question} -> {text}"
        for (question, value), text in zip(held_out, said, strict=True)
        if not mentions(text, value)
    ]
    before = base(questions)
    known = sum(mentions(text, value) for (_, value), text in zip(held_out, before, strict=True))
    values = [fact.value for fact in facts]
    measured = {"recall": 1 - len(misses) / len(held_out), "base_recall": known / len(held_out)}
    for name in ("leak", "co", "unstored"):
        prompts: list[str] = getattr(around, name)
        leaks = [any(mentions(text, value) for value in values) for text in adapted(prompts)]
        measured[name] = sum(leaks) / max(1, len(leaks))
    return measured, misses


@torch.no_grad()
def drift(top: TopLayers, examples: Sequence[Example], deltas: Deltas) -> tuple[float, float]:
    """Mean KL (nats) to the base model over its own answers' tokens, and the share of equal next tokens."""
    kl = same = count = 0.0
    for one in examples:
        features = top.features(torch.tensor([one.ids]))
        where = slice(len(one.prompt) - 1, len(one.ids))
        before, after = (top.logits(top.hidden(features, some)[0, where]) for some in ({}, deltas))
        tokens = before.shape[0]
        kl += float(divergence(before, after)) * tokens
        same += float((before.argmax(-1) == after.argmax(-1)).sum())
        count += tokens
    return (kl / count, same / count) if count else (float("nan"), float("nan"))


def as_examples(prompts: Sequence[str], query: Callable[[str], Ids], answers: Sequence[Ids]) -> list[Example]:
    """Prompts with the base model's answers; those without any are left out."""
    return [Example(query(p), ids) for p, ids in zip(prompts, answers, strict=True) if ids]
