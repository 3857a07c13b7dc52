"""Training a small adapter on facts, beside what must stay as the base model has it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from memos_engine.consolidate.facts import Fact, Surroundings
from memos_engine.consolidate.forward import TopLayers
from memos_engine.consolidate.recipe import Recipe
from memos_engine.decoder.adapter import Adapter, LowRank
from memos_engine.decoder.adapter_record import made, projection_shapes
from memos_engine.errors import MemosEngineError

Ids = tuple[int, ...]
Progress = Callable[[str, int, int], None]  # what is done, how far, of how many
_TOGETHER = 16


@dataclass
class Example:
    """A prompt and the answer whose tokens count; what enters the adapted layers, and for answers that are to
    stay, the base model's last hidden states over them `[answer tokens, hidden]`."""

    prompt: Ids
    answer: Ids
    features: Tensor | None = None
    base: Tensor | None = None

    @property
    def ids(self) -> Ids:
        return (*self.prompt, *self.answer[:-1])


@dataclass
class Kinds:
    """Examples by kind."""

    facts: list[Example]
    swaps: list[Example]
    own: list[Example]
    mentions: list[Example]
    replay: list[Example]


@dataclass(frozen=True)
class Trained:
    """loss: the last step's cross-entropy on the facts, and its KLs by kind."""

    adapter: Adapter
    steps: int
    loss: dict[str, float]
    cpu_s: float


class Diverged(MemosEngineError):
    """Training produced numbers that are none; take a smaller lr."""


def prepare(
    top: TopLayers,
    facts: Sequence[Fact],
    around: Surroundings,
    recipe: Recipe,
    query: Callable[[str], Ids],
    answer: Callable[[str], Ids],
    base_answers: Callable[[Sequence[str], int], list[Ids]],
    progress: Progress,
) -> Kinds:
    """Tokens, features and the base model's own answers, once for all steps. query and answer: text to ids;
    base_answers: what the base model says to prompts, greedily."""

    def forced(pairs: Sequence[tuple[str, str]]) -> list[Example]:
        return [Example(query(question), answer(text)) for question, text in pairs]

    def free(prompts: Sequence[str], tokens: int) -> list[Example]:
        said = base_answers(prompts, tokens)
        return [Example(query(p), ids) for p, ids in zip(prompts, said, strict=True) if ids]

    learnt = [(question, fact.answer) for fact in facts for question in fact.questions]
    kinds = Kinds(
        facts=forced(learnt),
        swaps=forced(around.swaps),
        own=free(around.own, 12),
        mentions=forced(around.mentions) + free(around.tasks, recipe.answer_tokens),
        replay=free(around.replay, recipe.answer_tokens),
    )
    every = [*kinds.facts, *kinds.swaps, *kinds.own, *kinds.mentions, *kinds.replay]
    every.sort(key=lambda one: len(one.ids))
    for start in range(0, len(every), _TOGETHER):
        group = every[start : start + _TOGETHER]
        _fill(top, group)
        progress("preparing", start + len(group), len(every))
    return kinds


@torch.no_grad()
def _fill(top: TopLayers, group: Sequence[Example]) -> None:
    features = top.features(_padded(group))
    hidden = top.hidden(features, {})
    for row, one in enumerate(group):
        one.features = features[row, : len(one.ids)].clone()
        one.base = hidden[row, len(one.prompt) - 1 : len(one.ids)].clone()


def train(top: TopLayers, kinds: Kinds, recipe: Recipe, dtype: torch.dtype, progress: Progress) -> Trained:
    """An adapter of gate, up and down in the top layers, in the model's `dtype`. Raises Diverged."""
    start = time.process_time()
    generator, rng = torch.Generator().manual_seed(recipe.seed), random.Random(recipe.seed)
    shapes, scale = projection_shapes(top.spec), recipe.alpha / recipe.rank
    deltas: dict[tuple[int, str], LowRank] = {}
    for layer in range(top.first, top.spec.num_layers):
        for name in ("gate", "up", "down"):
            out, width = shapes[name]
            a = torch.randn(recipe.rank, width, generator=generator) * (3 * width) ** -0.5
            deltas[layer, name] = LowRank(
                a.requires_grad_(), torch.zeros(out, recipe.rank, requires_grad=True), scale
            )
    parameters = [tensor for delta in deltas.values() for tensor in (delta.a, delta.b)]
    optimiser = torch.optim.AdamW(parameters, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0)
    weights = {"facts": 1.0, "swaps": 1.0, "own": 1.0, "mentions": 1.0, "replay": recipe.replay_weight}
    losses: dict[str, float] = {}
    decks: dict[str, list[Example]] = {}
    for step in range(recipe.steps):
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate(step)
        batch = [
            (kind, _draw(decks, kinds, kind, rng)) for kind in weights for _ in range(getattr(recipe, kind))
        ]
        batch = [(kind, one) for kind, one in batch if one is not None]
        losses = _step(top, [(kind, one) for kind, one in batch if one], deltas, weights)
        gradients = torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        if not bool(torch.isfinite(gradients)):
            raise Diverged(f"the gradients of step {step} are no numbers; repeat with a smaller lr.")
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        progress(f"training, loss {losses['facts']:.3f}", step + 1, recipe.steps)
    modules = {
        key: LowRank(delta.a.detach().to(dtype), delta.b.detach().to(dtype), scale)
        for key, delta in deltas.items()
    }
    return Trained(made(modules), recipe.steps, losses, time.process_time() - start)


def _draw(decks: dict[str, list[Example]], kinds: Kinds, kind: str, rng: random.Random) -> Example | None:
    """The next example of a kind: all of them in a random order before any comes again."""
    if not decks.get(kind):
        decks[kind] = list(getattr(kinds, kind))
        rng.shuffle(decks[kind])
    return decks[kind].pop() if decks[kind] else None


def _step(
    top: TopLayers,
    batch: Sequence[tuple[str, Example]],
    deltas: dict[tuple[int, str], LowRank],
    weights: dict[str, float],
) -> dict[str, float]:
    """One forward and backward; mean loss over answer tokens by kind."""
    features = [one.features for _, one in batch if one.features is not None]
    hidden = top.hidden(torch.nn.utils.rnn.pad_sequence(features, batch_first=True), deltas)
    total = torch.zeros((), device=hidden.device)
    losses = {}
    for kind, weight in weights.items():
        rows = [(row, one) for row, (name, one) in enumerate(batch) if name == kind]
        if not rows:
            continue
        at = torch.cat([hidden[row, len(one.prompt) - 1 : len(one.ids)] for row, one in rows])
        logits = top.logits(at)
        if kind == "facts":
            wanted = torch.tensor([token for _, one in rows for token in one.answer], device=hidden.device)
            loss = functional.cross_entropy(logits, wanted)
        else:
            loss = divergence(
                top.logits(torch.cat([one.base for _, one in rows if one.base is not None])), logits
            )
        total = total + weight * loss
        losses[kind] = float(loss.detach())
    total.backward()  # type: ignore[no-untyped-call]
    return losses


def divergence(base: Tensor, other: Tensor) -> Tensor:
    """Mean KL(base, other) in nats over rows of logits."""
    first, second = functional.log_softmax(base, -1), functional.log_softmax(other, -1)
    return functional.kl_div(second, first, log_target=True, reduction="batchmean")


def _padded(group: Sequence[Example]) -> Tensor:
    """Ids `[rows, tokens]`, filled up behind, where nothing before looks."""
    rows = [torch.tensor(one.ids) for one in group]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
