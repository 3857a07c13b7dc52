"""From facts to a stored adapter, on a tiny random model: the machinery, not the quality."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from memos_engine import MemoryEngine
from memos_engine.consolidate import Fact, Gates, Recipe, consolidate, read_facts
from memos_engine.consolidate.facts import alike, mentions, surroundings
from memos_engine.consolidate.prompts import ordinary
from memos_engine.errors import (
    LifecycleError,
    MemoryInputError,
    MemoryNotFoundError,
    MemosEngineError,
    StoreError,
)
from memos_engine.interfaces.cli import app

QUICK = Recipe(
    rank=8, share=1.0, steps=150, lr=1e-2, facts=3, swaps=1, own=0, mentions=0, replay=1, answer_tokens=3
)
ANY = Gates(recall=0.0, leak=1.0, co=1.0, unstored=1.0, kl=99.0, agreement=0.0, mention_kl=99.0)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer surroundings: a byte-level tokenizer makes long prompts."""
    import memos_engine.consolidate.run as module

    def less(facts: Any, seed: int = 0) -> Any:
        found = surroundings(facts, seed)
        return replace(found, **{name: value[:3] for name, value in vars(found).items()})

    monkeypatch.setattr(module, "surroundings", less)


@pytest.mark.usefixtures("few")
def test_facts_are_learnt_measured_and_stored(engine: MemoryEngine, facts: list[Fact]) -> None:
    alice = engine.user("alice")
    memory = alice.remember("Alice bakes, and her cat is Tom.")
    told: list[tuple[str, int, int]] = []
    known = [replace(fact, held_out=(fact.questions[0] + " ",), memory=memory.id) for fact in facts]
    done = consolidate(
        engine,
        alice.principal,
        "facts",
        known,
        recipe=QUICK,
        gates=ANY,
        progress=lambda *now: told.append(now),
    )
    report = done.report
    assert report.training["loss"]["facts"] < 0.5  # from log(259) = 5.6
    assert report.measured["base_recall"] == 0.0
    assert report.measured["recall"] == 1.0, (
        report.misses
    )  # the wordings are the learnt ones, but for a space
    assert report.passed
    assert done.version.state == "stored"
    assert [one for one, _ in done.version.sources] == [memory.id]
    assert {what.split(",")[0] for what, _, _ in told} == {"preparing", "training", "measuring"}
    assert all(0 <= at <= of for _, at, of in told)
    adapter = alice.adapters
    assert adapter.promote("facts", 1).report["facts"][0]["value"] == "bakes"
    chosen = engine.parameter.choose(alice.principal, [(memory.id, 0.9)], "What does Alice do?")
    assert chosen.option is not None
    alice.delete(memory.id)
    assert adapter.list(everything=True)[0].report == {}


@pytest.mark.usefixtures("few")
def test_a_failed_gate_keeps_it_unused(engine: MemoryEngine, facts: list[Fact]) -> None:
    alice = engine.user("alice")
    recipe = replace(QUICK, steps=1)
    done = consolidate(engine, alice.principal, "facts", facts, recipe=recipe, promote=True)
    assert "recall" in done.report.failed
    assert done.version.state == "stored"
    assert done.version.report["passed"] is False
    with pytest.raises(LifecycleError, match="did not pass"):
        alice.adapters.promote("facts", 1)
    assert alice.adapters.list() == []
    again = consolidate(engine, alice.principal, "facts", facts, recipe=recipe)
    assert again.version.digest == done.version.digest  # equal facts and seed, equal numbers
    assert json.loads(json.dumps(done.report.to_dict()))["gates"]["recall"] == 0.8
    engine.decoder.check_integrity()
    with pytest.raises(MemoryNotFoundError):
        consolidate(engine, alice.principal, "facts", facts, sources=["0" * 36])
    engine.parameter = None
    with pytest.raises(StoreError, match="no store"):
        consolidate(engine, alice.principal, "facts", facts)


def test_gates_are_closed_to_what_is_no_number() -> None:
    good = {
        "recall": 0.9,
        "leak": 0.0,
        "co": 0.0,
        "unstored": 0.0,
        "kl": 0.01,
        "agreement": 0.99,
        "mention_kl": 0.0,
    }
    assert Gates().failed(good) == []
    for name in good:
        assert Gates().failed({**good, name: float("nan")}) == [name]
        worse = 0.1 if name in ("recall", "agreement") else 0.9
        assert Gates().failed({**good, name: worse}) == [name]
    with pytest.raises(MemoryInputError):
        Gates(recall=-1)


def test_surroundings_share_nothing_with_what_is_measured(facts: list[Fact]) -> None:
    around = surroundings(facts)
    assert surroundings(facts) == around
    learnt = {q for q, _ in around.swaps} | set(around.own) | {q for q, _ in around.mentions}
    learnt |= set(around.tasks) | set(around.replay) | {q for fact in facts for q in fact.questions}
    measured = [*around.leak, *around.co, *around.unstored, *around.test_tasks, *around.drift]
    assert not learnt & set(measured)
    assert (len(around.drift), len(set(ordinary()))) == (64, 156)
    for question, answer in around.swaps:
        assert not mentions(question + answer, "Alice")
    assert all(mentions(question, "Alice") for question in (*around.co, *around.unstored, *around.test_tasks))
    assert not any(mentions(name, "Alice") for name in alike("Alice"))
    assert "Brighton Labs" not in [*alike("Brighton Labs")]


def _row(**changes: Any) -> dict[str, Any]:
    good = {
        "subject": "Al",
        "answer": "Al is 5.",
        "value": "5",
        "questions": ["Al?"],
        "held_out": ["And Al?"],
    }
    return {**good, **changes}


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([_row(value="6")], "does not hold its value"),
        ([_row(questions=["Who?"])], "does not name"),
        ([_row(held_out=["AL?"])], "learnt and held out"),
        ([_row(questions=[])], "needs 1 to"),
        ([_row(value="Al")], "names its subject"),
        ([_row(subject="")], "empty"),
        ([], "0 facts"),
        ([_row()] * 65, "65 facts"),
        ([{}], "cannot be read"),
        ("x", "cannot be read"),
        (3, "cannot be read"),
    ],
)
def test_facts_are_checked(tmp_path: Path, rows: Any, why: str) -> None:
    (tmp_path / "facts.json").write_text(json.dumps(rows))
    with pytest.raises(MemoryInputError, match=why):
        read_facts(tmp_path / "facts.json")


def test_recipes_are_checked() -> None:
    for changes in ({"rank": 0}, {"steps": 1.5}, {"share": 0.0}, {"lr": 2.0}, {"alpha": -1.0}):
        with pytest.raises(MemoryInputError):
            Recipe(**changes)
    assert (Recipe().first(30), Recipe(share=1.0).first(3), Recipe(share=0.01).first(3)) == (20, 0, 2)
    rates = [Recipe().rate(step) for step in range(48)]
    assert max(rates) == pytest.approx(4e-3)
    assert rates[-1] < 5e-4


@pytest.mark.usefixtures("few")
def test_the_command(
    tiny_folder: Path, tmp_path: Path, facts: list[Fact], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps({"facts": [fact.to_dict() for fact in facts]}))
    run: Callable[..., Any] = lambda *words: CliRunner().invoke(  # noqa: E731
        app, ["cube", "consolidate", str(path), "--name", "f", "--store", str(tmp_path / "s"), *words]
    )
    monkeypatch.setenv("MEMOS_ENGINE_MODEL", str(tiny_folder))
    refused = run("--json")
    assert refused.exit_code != 0
    assert isinstance(refused.exception, (MemosEngineError, SystemExit))
    torch.set_num_threads(1)
    done = run("--experimental", "--steps", "1", "--json")
    assert done.exit_code == 1, done.output  # a gate failed
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["report"]["passed"] is False
    assert found["adapter"]["state"] == "stored"
    shown = run("--experimental", "--steps", "1")
    assert "recall" in shown.stdout
    assert "not promoted" in shown.stdout
