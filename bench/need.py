"""How likely is a memory needed, given what retrieval says of it: fits the scheduler's `NeedModel`.

Questions of LoCoMo's dialogues, with turns as memories and with runs of turns, about LENGTHS tokens long; a
memory is needed if it holds the question's evidence. Fitted on every other dialogue, scored on the ones
between. What is shipped (memory/need.py) was fitted this way, never on the sets that the budget bench asks.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from memos_engine.bench.document import Document, Row
from memos_engine.bench.locomo import Dialogue, dialogues
from memos_engine.bench.options import Options, Progress, silent
from memos_engine.bench.retrieval import DATASET
from memos_engine.bench.xquad import DatasetError, find

from memos_engine.memory.embed import default_embedder
from memos_engine.memory.governance import Principal
from memos_engine.memory.need import DEFAULT_NEED, NeedModel, features
from memos_engine.memory.operator import MemOperator
from memos_engine.memory.store import MemoryStore

CANDIDATES = 16
LENGTHS = (0, 100, 200, 400)  # tokens; 0: a turn each
CHARACTERS, WRAPPER = 4.2, 5  # of a token, about; tokens around a memory
RIDGE, STEPS = 1.0, 30
BINS = 10
Floats = npt.NDArray[np.float64]


def run(options: Options, progress: Progress = silent) -> dict[str, Any]:
    """The result document of `bench need`."""
    document = Document("need", options)
    path = find(DATASET, options.data)
    found = dialogues(json.loads(path.read_text()))
    if options.quick:
        found = found[:2]
    if len(found) < 2:
        raise DatasetError(f"{path} holds {len(found)} dialogue; fitting and scoring need two.")
    sides: dict[int, list[list[tuple[Floats, Floats]]]] = {length: [[], []] for length in LENGTHS}
    with tempfile.TemporaryDirectory() as folder, MemoryStore.open(Path(folder) / "store") as store:
        operator = MemOperator(store, default_embedder())
        for number, dialogue in enumerate(found):
            for length in LENGTHS:
                progress("searching", number, len(found))
                sides[length][number % 2] += _questions(operator, f"{number}-{length}", dialogue, length)
    fitted = fit(*_joined([one for both in sides.values() for one in both[0]]))
    for name, model in (("fitted here", fitted), ("as shipped", DEFAULT_NEED)):
        for part, which in (("fitted on", 0), ("held out", 1)):
            for length, both in sides.items():
                x, y = _joined(both[which])
                row: Row = {"model": name, "part": part, "tokens": length or "a turn"}
                row |= {"questions": len(both[which]), "n": len(y), **scores(model, x, y)}
                row |= {"coefficients": [round(c, 3) for c in astuple(model)]}
                document.add(f"{name} {part} {length}", [row])
    document.note(
        f"The first {CANDIDATES} candidates of every question. log_loss in nats; base_log_loss: of a model "
        "that gives every candidate the same probability; calibration_error: mean distance of "
        "predicted from observed shares, over ten bins of as many candidates."
    )
    return document.finish()


def passages(dialogue: Dialogue, tokens: int) -> list[list[int]]:
    """Runs of turns with about so many tokens each; with 0 every turn is one."""
    runs: list[list[int]] = []
    room = 0.0
    for number, turn in enumerate(dialogue.turns):
        if room <= 0:
            runs.append([])
            room = tokens
        runs[-1].append(number)
        room -= len(turn.text) / CHARACTERS
    return runs


def remembered(operator: MemOperator, who: Principal, dialogue: Dialogue, tokens: int) -> dict[int, str]:
    """Remembers `passages`; by number of a turn: the id of the memory that holds it."""
    holder: dict[int, str] = {}
    for run in passages(dialogue, tokens):
        turns = [dialogue.turns[number] for number in run]
        text = "\n".join(turn.text for turn in turns)
        cube = operator.remember(who, text, session=turns[0].session, valid_from=turns[0].at)
        holder |= dict.fromkeys(run, cube.id)
    return holder


def _questions(
    operator: MemOperator, name: str, dialogue: Dialogue, tokens: int
) -> list[tuple[Floats, Floats]]:
    """Of each question: features `[candidates, 6]`, and whether each is evidence."""
    who = Principal(DATASET, name)
    holder = remembered(operator, who, dialogue, tokens)
    out = []
    for question in dialogue.questions:
        evidence = {holder[turn] for turn in question.evidence}
        hits = operator.recall(who, question.text, k=CANDIDATES)
        lengths = [len(hit.cube.body or "") / CHARACTERS + WRAPPER for hit in hits]
        x = features([hit.score for hit in hits], [hit.relevance for hit in hits], lengths)
        out.append((x, np.asarray([hit.cube.id in evidence for hit in hits], np.float64)))
    return out


def _joined(side: Sequence[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    return np.concatenate([x for x, _ in side]), np.concatenate([y for _, y in side])


def fit(x: Floats, y: Floats) -> NeedModel:
    """Logistic regression by Newton's method, with a small ridge on all but the constant."""
    weights, ridge = np.zeros(x.shape[1]), RIDGE * np.eye(x.shape[1])
    ridge[0, 0] = 0
    for _ in range(STEPS):
        p = 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))
        gradient = x.T @ (y - p) - ridge @ weights
        hessian = (x * (p * (1 - p))[:, None]).T @ x + ridge
        weights = weights + np.linalg.solve(hessian, gradient)
    return NeedModel(*map(float, weights))


def scores(model: NeedModel, x: Floats, y: Floats) -> dict[str, float]:
    """How good and how honest the probabilities are."""
    p = 1 / (1 + np.exp(-np.clip(x @ np.asarray(astuple(model)), -30, 30)))
    base = float(y.mean())
    order = np.argsort(p)
    bins = np.array_split(order, BINS)
    error = sum(len(one) * abs(float(p[one].mean() - y[one].mean())) for one in bins if len(one)) / len(y)

    def loss(q: Floats) -> float:
        q = np.clip(q, 1e-9, 1 - 1e-9)
        return float(-(y * np.log(q) + (1 - y) * np.log(1 - q)).mean())

    return {
        "base_rate": round(base, 4),
        "log_loss": round(loss(p), 4),
        "base_log_loss": round(loss(np.full(len(y), base)), 4),
        "calibration_error": round(error, 4),
    }
