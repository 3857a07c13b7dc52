"""How likely is a memory needed, given what retrieval says of it: fits the scheduler's `NeedModel`.

Questions of LoCoMo's dialogues; a turn is needed if it holds the question's evidence. Fitted on every other
dialogue, scored on the ones between. What is shipped (memory/need.py) was fitted this way, never on the sets
that the budget bench asks.
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
from memos_engine.bench.document import Document
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
    sides: list[list[tuple[Floats, Floats]]] = [[], []]
    with tempfile.TemporaryDirectory() as folder, MemoryStore.open(Path(folder) / "store") as store:
        operator = MemOperator(store, default_embedder())
        for number, dialogue in enumerate(found):
            progress("searching", number, len(found))
            sides[number % 2] += _questions(operator, number, dialogue)
    fitted = fit(*_joined(sides[0]))
    for name, model in (("fitted here", fitted), ("as shipped", DEFAULT_NEED)):
        for part, side in (("fitted on", sides[0]), ("held out", sides[1])):
            x, y = _joined(side)
            row = {"model": name, "part": part, "questions": len(side), "n": len(y), **scores(model, x, y)}
            document.add(f"{name} {part}", [row | {"coefficients": [round(c, 3) for c in astuple(model)]}])
    document.note(
        f"The first {CANDIDATES} candidates of every question. log_loss in nats; base_log_loss: of a model "
        "that gives every candidate the same probability; calibration_error: mean distance of "
        "predicted from observed shares, over ten bins of as many candidates."
    )
    return document.finish()


def _questions(operator: MemOperator, number: int, dialogue: Dialogue) -> list[tuple[Floats, Floats]]:
    """Of each question: features `[candidates, 5]`, and whether each is evidence."""
    who = Principal(DATASET, f"dialogue-{number}")
    ids = [
        operator.remember(who, turn.text, session=turn.session, valid_from=turn.at).id
        for turn in dialogue.turns
    ]
    out = []
    for question in dialogue.questions:
        evidence = {ids[turn] for turn in question.evidence}
        hits = operator.recall(who, question.text, k=CANDIDATES)
        x = features([hit.score for hit in hits], [hit.relevance for hit in hits])
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
    error = sum(len(one) * abs(float(p[one].mean() - y[one].mean())) for one in bins) / len(y)

    def loss(q: Floats) -> float:
        q = np.clip(q, 1e-9, 1 - 1e-9)
        return float(-(y * np.log(q) + (1 - y) * np.log(1 - q)).mean())

    return {
        "base_rate": round(base, 4),
        "log_loss": round(loss(p), 4),
        "base_log_loss": round(loss(np.full(len(y), base)), 4),
        "calibration_error": round(error, 4),
    }
